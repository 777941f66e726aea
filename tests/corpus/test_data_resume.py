"""A data processing job that is killed, changed or run again, and one that several processes share."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from model.corpus.change_samples import ChangeSamples
from model.corpus.cleaning import CleaningOptions
from model.corpus.job_folder import JobFolder, job_path
from model.corpus.part_file import Damaged, Part, PartColumns, payload_path, write_part
from model.errors import InputError
from optimized_data_processing import OptimizedDataProcessor
from tests import forks
from tests.conftest import ROOT, corpus_lines, process_data
from tests.corpus.half_made import Killed, begin_and_stop, contents
from tests.tiny_runs import HUNG, finish_ranks, mostly, start_two_ranks, wait_for

SCRIPT = str(ROOT / "optimized_data_processing.py")
FILES = ("data.bin", "data.json", "data.ends", "data.rejects.jsonl", "data.changes.jsonl", "data_stats.json")
SMALL = {"chunk_size": 40, "save_interval": 3000}  # parts of 24 kB


def dirty_lines(count: int) -> list[bytes]:
    """Lines of which every fifth is damaged, some repeat, and some need cleaning."""
    lines = corpus_lines(count)
    damaged = [b"[" + line if number % 5 == 0 else line for number, line in enumerate(lines)]
    spaced = [line.replace("。".encode(), "。\u3000 \\n".encode()) for line in lines[7 : count // 2]]
    return damaged + lines[100 : count // 2] + spaced


@pytest.fixture
def raw(tmp_path) -> Path:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"".join(dirty_lines(240)))
    return path


@pytest.fixture
def processor(tokenizer_folder) -> OptimizedDataProcessor:
    return OptimizedDataProcessor(tokenizer_folder, workers=0, **SMALL)


# --------------------------------------------------------------------------------------------------------- killed


@pytest.mark.long
def test_killed_at_any_instant_and_run_again_the_files_are_the_same(tmp_path, tokenizer_folder):
    """kill -9 of the real script and its workers' parent at random instants (more: tests/reliability/data_kills.py)."""
    (tmp_path / "raw.jsonl").write_bytes(b"".join(dirty_lines(4000)))
    flags = ["--input_path", "raw.jsonl", "--tokenizer_path", tokenizer_folder, "--workers", 2]
    flags += ["--save_interval", 3000]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = process_data(*flags, "--output_path", whole / "data.bin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    instants, kills = random.Random(), 0
    command = [sys.executable, SCRIPT, *map(str, flags), "--output_path", str(killed / "data.bin")]
    for _ in range(12):
        parts = len(list(killed.glob("data.bin.parts/*.npz")))
        process = forks.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and kills < 3:
            if len(list(killed.glob("data.bin.parts/*.npz"))) > parts:  # it goes on
                time.sleep(instants.uniform(0, 0.1))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            if kills >= 2:
                break
            shutil.rmtree(killed)  # it was done before it could be killed
    assert kills >= 2
    assert sorted(path.name for path in killed.iterdir()) == sorted({*FILES, "data_stats.png"})
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.long
def test_whichever_flush_fails_nothing_is_published(raw, processor, tmp_path, monkeypatch):
    """The system reports a failed fsync once, so one in the background must not get lost."""
    monkeypatch.setattr("model.corpus.merge.FLUSHED_AT_ONCE", 3000)
    fsync, failed = os.fsync, []
    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    for number in range(100):
        calls = [0]

        def fail_once(descriptor: int, calls=calls, number=number) -> None:
            calls[0] += 1
            if calls[0] == number + 1:
                failed.append(threading.current_thread() is threading.main_thread())
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        output = tmp_path / str(number) / "data.bin"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_once)
            try:
                processor.process_dataset(raw, output)
            except InputError as error:
                assert "Input/output error" in str(error)
        if len(failed) == number:
            break  # there is no such call
        published = {path.name for path in output.parent.glob("data*")} - {"data.bin.parts"}
        assert not published
        processor.process_dataset(raw, output)
        assert output.read_bytes() == (tmp_path / "whole" / "data.bin").read_bytes()
    assert failed.count(False) > 2 and failed.count(True) > 4


PLACES = {
    "os.replace": (os, "replace"),  # of parts, of records, and of the finished files
    "os.unlink": (os, "unlink"),
    "rmtree": (shutil, "rmtree"),
    "merged": (JobFolder, "start_merging"),
    "finish": (JobFolder, "finish"),
    "publish": (JobFolder, "publish"),
}


@pytest.mark.long
@pytest.mark.parametrize("place", mostly(PLACES, slow=["os.unlink"]))
def test_stopped_before_each_step_the_files_are_the_same(raw, processor, tmp_path, monkeypatch, place):
    """Stops before every call of one step in turn."""
    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    target, name = PLACES[place]
    original = getattr(target, name)
    for skipped in range(100):
        calls = [0]

        def stop(*arguments, calls=calls, skipped=skipped, **keywords):
            calls[0] += 1
            if calls[0] == skipped + 1:
                raise Killed
            return original(*arguments, **keywords)

        output = tmp_path / f"cut{skipped}" / "data.bin"
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            try:
                processor.process_dataset(raw, output)
                break  # the step is not taken more often
            except Killed:
                pass
        processor.process_dataset(raw, output)
        assert contents(output) == contents(tmp_path / "whole" / "data.bin")
        assert not job_path(output).exists()
    assert skipped >= 1


@pytest.mark.long
def test_a_worker_that_dies_is_reported_and_the_next_run_completes_the_job(
    raw, processor, tokenizer_folder, tmp_path, monkeypatch
):
    import model.corpus.worker as worker

    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    started, original = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", start)
    several = OptimizedDataProcessor(tokenizer_folder, workers=2, **SMALL)
    output = tmp_path / "data.bin"
    first = worker._Worker.carry_out

    def kill_then_carry_out(self, task):
        started[0].kill()
        started[0].wait()
        return first(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(worker._Worker, "carry_out", kill_then_carry_out)
        with pytest.raises(InputError, match="worker process ended with exit code -9.*run it again"):
            several.process_dataset(raw, output)
    assert all(process.poll() is not None for process in started)
    several.process_dataset(raw, output)
    assert contents(output) == contents(tmp_path / "whole" / "data.bin")


@pytest.mark.long
def test_a_fault_in_a_worker_is_told_as_one_here(raw, tokenizer_folder, tmp_path, monkeypatch):
    import model.corpus.worker as worker

    fault = "from model.corpus.part_maker import PartMaker; PartMaker.make = lambda *given: {}[b'key']"
    monkeypatch.setattr(worker, "PROGRAM", worker.PROGRAM.replace("main()", f"{fault}; main()"))
    processor = OptimizedDataProcessor(tokenizer_folder, workers=1, **SMALL)
    with pytest.raises(RuntimeError, match=r"^KeyError: b'key' \(in a worker's <string>:\d+\)\nTraceback"):
        processor.process_dataset(raw, tmp_path / "data.bin")


@pytest.mark.long
def test_workers_import_nothing_from_where_the_user_works(tmp_path):
    for name in ("model/__init__.py", "numpy.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    (tmp_path / "raw.jsonl").write_bytes(b"".join(corpus_lines(20)))
    flags = ["--input_path", "raw.jsonl", "--output_path", "data.bin", "--workers", "1"]
    ended = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "data.bin").exists()


def test_a_job_that_begins_while_another_leaves_keeps_its_folder(tmp_path):
    output, begun = tmp_path / "data.bin", []
    first = JobFolder(output)
    first.begin({"a": 1})
    release = first._lock.release

    def release_and_begin(*given, **options):
        release(*given, **options)
        begun.append(JobFolder(output))
        begun[0].begin({"a": 2})

    first._lock.release = release_and_begin
    first.remove()
    assert begun[0].planned() == {"a": 2}
    with pytest.raises(InputError, match="is in use"):
        JobFolder(output)
    begun[0].remove()
    assert not job_path(output).exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
@pytest.mark.parametrize("at_work", [False, True])
def test_workers_end_without_a_word_when_their_parent_is_killed(tmp_path, at_work):
    (tmp_path / "raw.jsonl").write_bytes(b"".join(corpus_lines(2000)) * 20)
    flags = ["--input_path", "raw.jsonl", "--output_path", "data.bin", "--workers", "2", "--deduplicate", "false"]
    flags += ["--save_interval", "5000"]
    parent = subprocess.Popen([sys.executable, SCRIPT, *flags], cwd=tmp_path, stderr=subprocess.PIPE)
    workers: list[int] = []
    while len(workers) < 2 and parent.poll() is None:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True)
        workers = [int(pid) for pid in listed.stdout.split()]
    wait_for(lambda: not at_work or list(tmp_path.glob("data.bin.parts/*.npz")), parent)
    parent.kill()
    parent.wait()
    assert workers
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert b"Traceback" not in parent.stderr.read()


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="signals a group of processes")
def test_ctrl_c_prints_one_line(tmp_path):
    (tmp_path / "raw.jsonl").write_bytes(b"".join(corpus_lines(2000)) * 20)
    flags = ["--input_path", "raw.jsonl", "--output_path", "data.bin", "--workers", "2", "--save_interval", "10000"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("data.bin.parts/*.npz")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, said = process.communicate(timeout=HUNG)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted" and "Traceback" not in said


# -------------------------------------------------------------------------------------------------- changed, run again


@pytest.mark.long
def test_a_half_made_output_is_not_continued_with_other_input_tokenizer_or_options(
    raw, processor, tmp_path, tokenizer_folder, monkeypatch
):
    output = tmp_path / "data.bin"
    begin_and_stop(processor, raw, output, monkeypatch)
    content = raw.read_bytes()
    with pytest.raises(InputError, match="the tokenizer .*--resume false"):
        OptimizedDataProcessor().process_dataset(raw, output)
    with pytest.raises(InputError, match=r"text_field \(was text, is content\)"):
        OptimizedDataProcessor(tokenizer_folder, text_field="content").process_dataset(raw, output)
    with pytest.raises(InputError, match=r"normalization \(was nfc, is nfkc\)"):
        OptimizedDataProcessor(tokenizer_folder, normalization="nfkc").process_dataset(raw, output)
    raw.write_bytes(content + b"\n")
    with pytest.raises(InputError, match="the input's size"):
        processor.process_dataset(raw, output)
    raw.write_bytes(content.replace("。".encode(), "！".encode(), 1))
    with pytest.raises(InputError, match="changed .bytes 0 to 24,000.*--resume false"):
        processor.process_dataset(raw, output)
    raw.write_bytes(content)
    other_pace = OptimizedDataProcessor(tokenizer_folder, save_interval=100_000)  # changes nothing
    counts = other_pace.process_dataset(raw, output)
    assert not job_path(output).exists()
    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    assert contents(output) == contents(tmp_path / "whole" / "data.bin")

    cleaned = tmp_path / "cleaned.jsonl"
    begin_and_stop(processor, raw, cleaned, monkeypatch, "validate_and_clean_jsonl")
    raw.write_bytes(content * 2)
    with pytest.raises(InputError, match="the input's size .*--resume false"):
        processor.validate_and_clean_jsonl(raw, cleaned)
    again = processor.validate_and_clean_jsonl(raw, cleaned, resume=False)
    assert again["documents"] == counts["documents"] == len(cleaned.read_bytes().splitlines())


def test_other_control_tokens_are_another_tokenizer_and_plans_without_them_resume(
    raw, tokenizer_folder, tmp_path, monkeypatch
):
    folder, output, finished = tmp_path / "tokenizer", tmp_path / "data.bin", tmp_path / "whole" / "data.bin"
    shutil.copytree(tokenizer_folder, folder)
    config, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    before = config.read_text(encoding="utf-8")
    changed = json.loads(before)
    changed["eos_token"] = changed["bos_token"]

    def make(path: Path) -> None:
        OptimizedDataProcessor(folder, workers=0, **SMALL).process_dataset(raw, path)

    make(finished)
    begin_and_stop(OptimizedDataProcessor(folder, workers=0, **SMALL), raw, output, monkeypatch)
    config.write_text(json.dumps(changed), encoding="utf-8")
    for path in (output, finished):
        with pytest.raises(
            InputError, match=r"changed since.*: end_ids .*, eos_id \(was \d+, is \d+\).*--resume false"
        ):
            make(path)
    config.write_text(before, encoding="utf-8")
    generation.write_text('{"eos_token_id": [5]}', encoding="utf-8")
    for path in (output, finished):
        with pytest.raises(InputError, match=r"changed since.*: end_ids \("):
            make(path)
    generation.unlink()
    for path in (job_path(output) / "plan.json", finished.with_suffix(".json")):  # as earlier versions wrote them
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = content if path.name == "plan.json" else content["processing"]["plan"]
        for name in ("bos_id", "eos_id", "end_ids"):
            del plan[name]
        path.write_text(json.dumps(content), encoding="utf-8")
    make(output)
    make(finished)
    assert output.read_bytes() == finished.read_bytes()
    config.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError, match=r"changed since.*: eos_id \("):  # which a finished output's manifest names
        make(finished)


@pytest.mark.long
def test_a_damaged_part_is_made_again(raw, processor, tmp_path, monkeypatch):
    output = tmp_path / "data.bin"
    begin_and_stop(processor, raw, output, monkeypatch)
    first, second, third = sorted(job_path(output).glob("*.npz"))
    first.write_bytes(first.read_bytes()[:-200])  # cut off
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 4  # one bit
    second.write_bytes(content)
    third.write_bytes(b"")
    processor.process_dataset(raw, output)
    processor.process_dataset(raw, tmp_path / "whole" / "data.bin")
    assert contents(output) == contents(tmp_path / "whole" / "data.bin")


def test_a_second_process_on_the_same_output_is_refused(raw, processor, tmp_path):
    with JobFolder(tmp_path / "data.bin"), pytest.raises(InputError, match="in use"):
        processor.process_dataset(raw, tmp_path / "data.bin")


@pytest.mark.long
@pytest.mark.parametrize("method", ["process_dataset", "validate_and_clean_jsonl"])
def test_a_finished_output_is_kept_and_never_replaced_unasked(raw, processor, tmp_path, capsys, method):
    output = tmp_path / "made" / "data.out"
    make = getattr(processor, method)
    first = make(raw, output)

    def files() -> dict:
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.parent.iterdir()}

    before = files()
    assert make(raw, output) == first
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match="val_share .*--resume false"):
        getattr(OptimizedDataProcessor(processor.options.tokenizer_path, val_share=0.5), method)(raw, output)
    content = raw.read_bytes()
    raw.write_bytes(content.replace("。".encode(), "！".encode(), 1))
    with pytest.raises(InputError, match="the content of .*raw.jsonl"):
        make(raw, output)
    raw.write_bytes(content)
    assert files() == before

    output.write_bytes(output.read_bytes()[:-2] + b"\x07\x00")
    with pytest.raises(InputError, match="damaged"):
        make(raw, output)
    make(raw, output, resume=False)
    assert output.read_bytes() == before["data.out"][1]

    theirs = tmp_path / "theirs.bin"  # MiniMind's, without a manifest
    theirs.write_bytes(b"\x01\x00\x02\x00")
    with pytest.raises(InputError, match="not made by this program"):
        make(raw, theirs)
    assert theirs.read_bytes() == b"\x01\x00\x02\x00"


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.long
def test_the_number_of_workers_changes_no_byte(raw, processor, tokenizer_folder, tmp_path):
    processor.process_dataset(raw, tmp_path / "one" / "data.bin")
    for workers in (2, 3):
        several = OptimizedDataProcessor(tokenizer_folder, workers=workers, **SMALL)
        several.process_dataset(raw, tmp_path / str(workers) / "data.bin")
        assert contents(tmp_path / str(workers) / "data.bin") == contents(tmp_path / "one" / "data.bin")


def torchrun(*flags, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *flags]
    return forks.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=HUNG)


def two_ranks(*flags, cwd: Path) -> subprocess.CompletedProcess:
    return finish_ranks(start_two_ranks([sys.executable, SCRIPT, *flags], cwd=cwd))


@pytest.mark.long
def test_two_processes_of_torchrun_give_the_bytes_of_one(raw, processor, tokenizer_folder, tmp_path):
    processor.process_dataset(raw, tmp_path / "one" / "data.bin")
    flags = ["--input_path", raw, "--tokenizer_path", tokenizer_folder, "--save_interval", 3000, "--chunk_size", 40]
    flags += ["--workers", 1, "--output_path", tmp_path / "two" / "data.bin"]
    done = torchrun(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, expected = contents(tmp_path / "two" / "data.bin"), contents(tmp_path / "one" / "data.bin")
    assert {name: made[name] for name in expected} == expected
    again = two_ranks(*flags, cwd=tmp_path)
    assert again.returncode == 0 and again.stderr.count("nothing to do") == 1
    bad = two_ranks(*flags, "--val_share", "0.5", cwd=tmp_path)
    assert bad.returncode != 0 and bad.stderr.count("error: ") >= 1 and "val_share" in bad.stderr


def test_a_part_with_a_damaged_payload_is_closed(tmp_path):
    """Windows removes no open file, and the part must go before it can be remade."""
    path = tmp_path / "part.npz"
    columns = PartColumns(ChangeSamples(CleaningOptions()), payload=[np.arange(3, dtype=np.uint8)])
    write_part(path, {"items": 3, "dtype": "uint8"}, columns)
    part = Part(path)
    assert part.payload().tolist() == [0, 1, 2] and part._file.zip is not None
    payload_path(path).write_bytes(b"\0\1\3")
    with pytest.raises(Damaged, match="part.npz: its payload is damaged"):
        part.payload()
    assert part._file.zip is None  # closed
    path.unlink()
