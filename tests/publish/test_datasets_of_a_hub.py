"""`datasets:OWNER/NAME` from a hub that answers, refuses, keeps silent or is not there."""

import pytest

from tests.conftest import corpus_lines
from tests.publish.test_publish import refused

pytest.importorskip("datasets")
pytest.importorskip("huggingface_hub.utils._http", reason="huggingface_hub 1 or newer")
pytestmark = pytest.mark.long


def process(interpreter, source: str, output) -> dict:
    words = ["--input_path", source, "--output_path", output, "--workers", 0, "--stats_path", output.with_suffix(".s")]
    return interpreter.run(["optimized_data_processing.py", *map(str, words)])


def test_a_dataset_of_the_hub_gives_the_tokens_of_its_file(hub, interpreter, tmp_path):
    lines = b"".join(corpus_lines(50))
    for folder in (tmp_path, hub.folder / "datasets" / "me" / "poems"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_bytes(lines)
    for name, source in (("streamed", "datasets:me/poems?split=train"), ("file", tmp_path / "train.jsonl")):
        answer = process(interpreter, source, tmp_path / f"{name}.bin")
        assert answer["code"] == 0, answer["stderr"]
    assert (tmp_path / "streamed.bin").read_bytes() == (tmp_path / "file.bin").read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/none", "has no dataset me/none, or a private one (404); check the name, or log in"),
        ("me/secret", "has no dataset me/secret, or a private one (401); check the name, or log in"),
        ("me/gated", "accept its terms at "),
        ("me/silent", "cannot be reached (no answer within 2 seconds); set HF_ENDPOINT to a mirror, read it from"),
        ("me/stuck", "cannot be reached (no answer within 2 seconds); set HF_ENDPOINT to a mirror, read it from"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line(hub, interpreter, tmp_path, name, message):
    stuck = hub.folder / "datasets" / "me" / "stuck"
    stuck.mkdir(parents=True, exist_ok=True)
    (stuck / "train.jsonl").write_bytes(b"{}")
    line = refused(process(interpreter, f"datasets:{name}?split=train", tmp_path / "d.bin"))
    assert line.startswith(f"error: input_path: datasets:{name}?split=train cannot be streamed: ") and message in line
    assert not list(tmp_path.iterdir())


def test_a_hub_that_refuses_connections_is_one_line_with_the_ways_out(cut_off, tmp_path):
    line = refused(process(cut_off, "datasets:me/poems?split=train", tmp_path / "d.bin"))
    for way in ("cannot be reached", "HF_ENDPOINT", "ms:OWNER/NAME", "give the files"):
        assert way in line
