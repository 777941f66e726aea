"""The files that TensorBoard reads: bytes, checksums and values, by a reader of the tests' own and by TensorBoard."""

import struct

import pytest

from model.runs.event_file import EVENT_FILES
from model.runs.metrics import MetricsLog
from tests.tiny_runs import events, train

KNOWN_CRCS = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43}  # RFC 3720, B.4


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmasked(masked: bytes) -> int:
    rotated = (struct.unpack("<I", masked)[0] - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def records(path) -> list[bytes]:
    """The data of each record; its frame must be right, and nothing may follow the last one."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data, rest = content[12 : 12 + length], content[12 + length :]
        assert unmasked(content[8:12]) == crc32c(content[:8]) and unmasked(rest[:4]) == crc32c(data)
        found.append(data)
        content = rest[4:]
    return found


def message(data: bytes) -> dict[int, list]:
    """The fields of a protobuf message by number: whole numbers, floats, bytes."""
    fields, position = {}, 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        size = {0: 0, 1: 8, 5: 4, 2: 0}[key & 7]
        if key & 7 == 0:
            value = varint()
        else:
            size = varint() if key & 7 == 2 else size
            value = data[position : position + size]
            assert len(value) == size
            position += size
            value = value if key & 7 == 2 else struct.unpack("<d" if size == 8 else "<f", value)[0]
        fields.setdefault(key >> 3, []).append(value)
    return fields


def scalars(folder) -> list[tuple[str, int, float]]:
    """Tag, step and value of each scalar in a folder's event file; that of the session before is empty."""
    (path,) = [path for path in folder.glob(EVENT_FILES) if path.stat().st_size]
    assert len(list(folder.glob(EVENT_FILES))) <= 2
    version, start, *rest = map(message, records(path))
    assert version[3] == [b"brain.Event:2"] and message(start[7][0]) == {1: [1]} and start[2] == [0]
    found = []
    for event in rest:
        for value in message(event[5][0]).get(1, []):
            fields = message(value)
            found.append((fields[1][0].decode(), event[2][0], fields[2][0]))
    return found


def logged(folder) -> list[tuple[str, int, float]]:
    """The same of metrics.jsonl, in float32; a name comes once a step."""
    found = {}
    for event in events(folder):
        for name, value in event.items():
            if name != "step" and value is not None:
                found.setdefault((name, event["step"]), struct.unpack("<f", struct.pack("<f", value))[0])
    return [(*key, value) for key, value in found.items()]


@pytest.mark.parametrize("data", KNOWN_CRCS)
def test_the_tests_own_crc_is_the_standards(data):
    assert crc32c(data) == KNOWN_CRCS[data]


def test_what_is_logged_is_what_the_file_holds(tmp_path, said):
    log = MetricsLog(tmp_path, 0, said.append, began=1_700_000_000.0)
    log.write({"step": 0, "val_loss": 5.5, "elapsed": 0.25})
    log.write({"step": 1, "loss": 1e300, "lr": float("nan"), "elapsed": 1.5, "tokens": 128})
    log.write({"step": 1, "val_loss": -2.5, "elapsed": 1.75, "tokens": 128})
    log.write({"step": 300, "loss": -1e300, "tokens": 2**40, "elapsed": 90.0})
    log.close()
    assert said == []
    assert scalars(tmp_path) == [
        ("val_loss", 0, 5.5), ("elapsed", 0, 0.25), ("loss", 1, float("inf")), ("elapsed", 1, 1.5), ("tokens", 1, 128),
        ("val_loss", 1, -2.5), ("loss", 300, float("-inf")), ("tokens", 300, 2**40), ("elapsed", 300, 90.0),
    ]  # fmt: skip
    (path,) = tmp_path.glob(EVENT_FILES)
    times = [message(record)[1][0] - 1_700_000_000 for record in records(path)]
    assert times == [0, 0, 0.25, 1.5, 1.75, 90]


def test_numbers_that_no_run_writes_end_none(tmp_path, said):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": {10**400}, "elapsed": {10**400}}}\n{{"step": -1, "loss": NaN}}\n'
    )
    MetricsLog(tmp_path, 5, said.append)
    (path,) = tmp_path.glob(EVENT_FILES)
    assert len(records(path)) == 4 and said == []


def test_a_session_that_was_cut_short_is_written_anew_without_what_comes_again(tmp_path, said):
    first = MetricsLog(tmp_path, 0, said.append)
    for step in range(1, 8):
        first.write({"step": step, "loss": 1.0 * step})
    (path,) = tmp_path.glob(EVENT_FILES)
    with open(path, "ab") as file:
        file.write(b"half a rec")
    (tmp_path / "events.out.tfevents.1.theirs").write_bytes(b"another program's")
    second = MetricsLog(tmp_path, 4, said.append)
    second.write({"step": 5, "loss": 50.0})
    second.close()
    assert path.read_bytes() == b""
    assert scalars(tmp_path) == [("loss", step, 1.0 * step) for step in range(1, 5)] + [("loss", 5, 50.0)]
    assert (tmp_path / "events.out.tfevents.1.theirs").read_bytes() == b"another program's"


def test_a_file_that_is_refused_costs_no_event(tmp_path, said):
    log = MetricsLog(tmp_path, 0, said.append)
    (path,) = tmp_path.glob(EVENT_FILES)
    whole = path.read_bytes()
    path.unlink()
    path.mkdir()
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 2.0})
    path.rmdir()
    path.write_bytes(whole)
    log.write({"step": 3, "loss": 3.0})
    log.close()
    assert [step for _, step, _ in scalars(tmp_path)] == [1, 2, 3]
    refused, again = said
    assert f"{path}: cannot be written" in refused and "the 3 events kept so far" in again


@pytest.mark.long
def test_a_resumed_run_has_every_step_once(flags, tmp_path):
    out = tmp_path / "out"
    train(flags(max_steps=8, eval_interval=4))
    (out / "checkpoint_step_8.pth").unlink()  # as if it had been killed before
    train(flags(resume="true"))
    assert scalars(out) == logged(out)
    train(flags(max_steps=4))
    assert scalars(out) == logged(out)
    (moved,) = (out / "previous").iterdir()
    assert scalars(moved) == logged(moved)


@pytest.mark.long
def test_tensorboard_reads_the_same_while_a_run_is_resumed(flags, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    train(flags(max_steps=8))
    watching = accumulator.EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0})
    watching.Reload()
    assert read_by(watching) == sorted(logged(out))
    (out / "checkpoint_step_8.pth").unlink()
    train(flags(resume="true"))
    watching.Reload()
    assert read_by(watching) == sorted(logged(out))


def read_by(accumulator) -> list[tuple[str, int, float]]:
    """Tag, step and value of each scalar, as TensorBoard has it."""
    tags = accumulator.Tags()["scalars"]
    return sorted((tag, event.step, event.value) for tag in tags for event in accumulator.Scalars(tag))
