"""What a run writes down, on full disks, in folders that vanish, and after crashes."""

import json
import shutil
import sys

import pytest

from model.runs.metrics import MetricsLog, read_metrics
from tests.tiny_runs import python

pytestmark = pytest.mark.pictures
needs_file_size_limit = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")


def line(step, **values):
    return json.dumps({"step": step} | values) + "\n"


def of_metrics(said):
    """What the user is told of metrics.jsonl; TensorBoard's file beside it has lines of its own."""
    return [text for text in said if "metrics.jsonl: " in text]


def steps(folder):
    """The step of each line of the file, all of which must be whole."""
    return [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_bytes().splitlines()]


# ------------------------------------------------------------------------------------------- what the system refuses

FULL_DISK = """
import json, pathlib, resource, sys
from model.runs.metrics import MetricsLog
folder, results = pathlib.Path(sys.argv[1]), []
for limit in range(100, 140):  # bytes that the disk has room for: every place of a line of 27, and more
    out, said = folder / str(limit), []
    out.mkdir()
    log = MetricsLog(out, 0, said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(1, 11):
        log.write({"step": step, "loss": 1.0625})
    full = (out / "metrics.jsonl").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write({"step": 11, "loss": 1.0625})
    log.close()
    results.append([full.decode(), (out / "metrics.jsonl").read_text(), said])
print(json.dumps(results))
"""


@needs_file_size_limit
def test_a_full_disk_costs_no_line_and_leaves_no_half_one(tmp_path):
    results = python(FULL_DISK.replace("sys.argv[1]", repr(str(tmp_path))))
    assert len(results) == 40
    for full, final, said in results:
        said = of_metrics(said)
        assert full.endswith("}\n") and 3 <= len(full.splitlines()) <= 5
        assert [json.loads(text)["step"] for text in final.splitlines()] == list(range(1, 12))
        refused, again = said
        assert "metrics.jsonl: cannot be written (File too large); training continues" in refused
        assert "can be written again" in again


def test_a_folder_that_vanishes_costs_no_line_that_comes_after(tmp_path, said):
    out = tmp_path / "out"
    out.mkdir()
    log = MetricsLog(out, 0, said.append)
    log.write({"step": 1, "loss": 2.0})
    for round_ in (1, 2):
        shutil.rmtree(out)
        for step in (2, 3, 4):
            log.write({"step": step * round_, "loss": 2.0})
        out.mkdir()
        log.write({"step": 5 * round_, "loss": 2.0})
        assert steps(out) == [2 * round_, 3 * round_, 4 * round_, 5 * round_]
    log.close()
    told = of_metrics(said)
    assert len(told) == 4 and all("No such file" in text for text in told[::2])  # once a streak, each time
    assert all("written again; the 4 lines" in text for text in told[1::2])


def test_lines_that_can_never_be_written_are_counted_at_the_end(tmp_path, said):
    (tmp_path / "metrics.jsonl").mkdir()
    log = MetricsLog(tmp_path, 0, said.append)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan")})
    log.close()
    first, last = said
    assert "metrics.jsonl: cannot be written" in first and "its last 3 lines are lost" in last


def test_a_file_that_cannot_be_put_right_at_the_start_is_put_right_later(tmp_path, said):
    """The old file, with events past the step and half a line, is not readable when the run resumes."""
    path, hidden = tmp_path / "metrics.jsonl", tmp_path / "hidden"
    hidden.write_text(line(1) + line(2) + line(3) + '{"step": 4, "lo')
    path.mkdir()
    log = MetricsLog(tmp_path, 2, said.append)
    log.write({"step": 3, "loss": 0.5})
    path.rmdir()
    hidden.rename(path)
    log.write({"step": 4, "loss": 0.25})
    assert path.read_text() == line(1) + line(2) + line(3, loss=0.5) + line(4, loss=0.25)
    assert len(said) == 2


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3, "loss": 1.', b"\0" * 4096, b'{"step": 3}', b"\xff\xfe\n", b"\0\0\n\0", b"[" * 99_999 + b"\n"],
)
def test_what_a_crash_left_at_the_end_is_dropped(tmp_path, said, tail):
    path = tmp_path / "metrics.jsonl"
    good = (line(1, loss=2.5) + line(2, loss=None)).encode()
    path.write_bytes(good + tail)
    log = MetricsLog(tmp_path, 5, said.append)
    assert path.read_bytes() == good
    log.write({"step": 6, "loss": 1.0})
    assert [event["step"] for event in read_metrics(path)] == [1, 2, 6] and said == []


def test_events_past_the_step_resumed_at_are_dropped(tmp_path, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) for step in (1, 2, 2, 3, 4)))
    MetricsLog(tmp_path, 2, said.append)
    assert steps(tmp_path) == [1, 2, 2] and said == []


@pytest.mark.long
def test_curves_that_cannot_be_written_are_reported_once(tmp_path, said):
    pytest.importorskip("matplotlib")
    (tmp_path / "curves.png" / "in the way").mkdir(parents=True)
    log = MetricsLog(tmp_path, 0, said.append)
    log.write({"step": 1, "loss": 2.0})
    log.draw_curves()
    log.draw_curves()
    assert len(said) == 1 and said[0].startswith("curves.png is not drawn: ") and "training continues" in said[0]
    shutil.rmtree(tmp_path / "curves.png")
    log.draw_curves()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and len(said) == 1
    (tmp_path / "metrics.jsonl").unlink()
    log.draw_curves()
    assert len(said) == 2


@pytest.mark.long
def test_curves_take_little_of_the_time_and_end_up_to_date(tmp_path, said, monkeypatch):
    pytest.importorskip("matplotlib")
    clock, drawn = [100.0], []
    monkeypatch.setattr("model.runs.metrics.time.monotonic", lambda: clock[0])

    def draw(events, path):
        drawn.append(len(events))
        clock[0] += 0.5

    monkeypatch.setattr("model.runs.metrics.draw_curves", draw)
    log = MetricsLog(tmp_path, 0, said.append)
    for step in range(100):  # an evaluation a second
        clock[0] += 1
        log.write({"step": step, "val_loss": 2.0})
        log.update_curves()
    assert drawn[0] == 10 and 0.5 * len(drawn) <= 0.05 * 100 + 0.5 and len(drawn) >= 8
    log.close()
    assert drawn[-1] == 100
    log.close()
    assert drawn.count(100) == 1 and said == []


@pytest.mark.long
@needs_file_size_limit
def test_curves_on_a_full_disk_are_reported_once_and_the_old_ones_stay(tmp_path):
    pytest.importorskip("matplotlib")
    said, before, after = python(f"""
import json, pathlib, resource
from model.runs.metrics import MetricsLog
folder, said = pathlib.Path({str(tmp_path)!r}), []
log = MetricsLog(folder, 0, said.append)
log.write({{"step": 1, "loss": 2.0}})
log.draw_curves()
before = (folder / "curves.png").read_bytes().hex()
resource.setrlimit(resource.RLIMIT_FSIZE, (9999, resource.RLIM_INFINITY))
log.draw_curves()
log.draw_curves()
print(json.dumps([said, before, (folder / "curves.png").read_bytes().hex()]))
""")
    assert len(said) == 1 and "File too large" in said[0] and before == after
    assert not list(tmp_path.glob("*.tmp"))
