"""What reaches a terminal: messages on one line, generated text without anything that a terminal obeys."""

import gc
import importlib
import os
import subprocess
import sys

import pytest

from model.command import CommandParser, heavy_imports, print_error, print_fault, print_message, run_command, screen
from model.errors import MOST_OF_MESSAGE, InputError, one_line, printable
from model.options import text_flag
from tests.conftest import ROOT

HOSTILE = "a\x1b[31mb\x9b2Jc\u202ed\u2066e\x07f\x00g\udcffh"
HARMLESS = r"a\x1b[31mb\x9b2Jc\u202ed\u2066e\x07f\x00g\udcffh"


def test_text_keeps_its_lines_and_loses_what_a_terminal_obeys():
    assert printable(HOSTILE) == HARMLESS
    assert printable("一行\n\t二行 👩‍👩‍👧 é\r\n") == "一行\n\t二行 👩‍👩‍👧 é\n"


def test_a_message_is_one_line_of_limited_length():
    assert one_line("a\nb\tc\u2028d\x85" + HOSTILE) == r"a\nb\tc\u2028d\x85" + HARMLESS
    assert len(one_line("x" * 200_000)) == MOST_OF_MESSAGE


def test_an_error_shows_both_ends_of_a_long_path(capsys):
    print_error(f"--config: /home/{'x' * 3000}/config.yaml: there is no such file")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --config: /home/xxx") and len(line) < 400
    assert line.endswith("xxx/config.yaml: there is no such file")
    print_error("/home/" + "x" * 250)
    assert capsys.readouterr().err.endswith("x" * 250 + "\n")


def test_garbage_is_collected_again_after_heavy_imports():
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), heavy_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > frozen


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train", ["--config", f"{HOSTILE[:-3]}\n.yaml"]),
        ("train", [f"--{HOSTILE[:-3]}"]),
        ("inference", ["--model_path", f"no\n{HOSTILE[:-3]}", "--prompt", "a"]),
        ("optimized_data_processing", ["--input_path", f"no\n{HOSTILE[:-3]}.jsonl", "--output_path", "x.bin"]),
        ("model.convert", [f"no\n{HOSTILE[:-3]}", "x.gguf"]),
    ],
)
def test_a_hostile_name_is_one_harmless_line(script, flags, monkeypatch, capsys):
    flags = [flag.replace("\x00", "") for flag in flags]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as exit_:
        run_command(importlib.import_module(script).main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1 and error == printable(error), error


def test_a_fault_is_one_line_that_names_its_report(capsys):
    try:
        raise KeyError("x" * 10_000 + "\n\x1b[2J")
    except KeyError as error:
        print_fault(error)
    line = capsys.readouterr().err
    report = line.split()[-1]
    assert line.startswith("error: KeyError: 'xxx") and line.count("\n") == 1 and len(line) < 600
    assert "test_command.py" in line
    with open(report, encoding="utf-8") as file:
        assert "Traceback" in file.read()
    os.unlink(report)


def test_messages_survive_a_log_that_is_gone(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    print_message("nobody reads this")


def test_a_bar_without_a_terminal_opens_no_file(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        monkeypatch.setattr(sys, "stderr", log)
        before = os.dup(log.fileno())
        os.close(before)
        screens = [screen() for _ in range(10)]
        after = os.dup(log.fileno())
        os.close(after)
    assert before == after and all(one.write("abc") == 3 for one in screens)


@pytest.mark.skipif(os.name == "nt", reason="pseudo terminals")
def test_generated_text_is_harmless_on_a_terminal_and_exact_in_a_pipe():
    import pty

    text = HOSTILE[:-2]
    command = [sys.executable, "-c", f"from model.command import print_text; print_text({text!r}, end='')"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert piped.stdout == text
    controller, terminal = pty.openpty()
    subprocess.run(command, cwd=ROOT, stdout=terminal, check=True)
    os.close(terminal)
    assert os.read(controller, 10_000).decode() == HARMLESS.replace(r"\udcffh", "")
    os.close(controller)


STREAMS_CLOSED = """
import subprocess, sys
from utils import run_command
def main():
    with open(sys.argv[1], "w") as file:
        print("text")
        print("message", file=sys.stderr)
        subprocess.run([sys.executable, "-c", "print('stray')"], check=True)
        file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
run_command(main)
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(tmp_path, closed):
    program = [sys.executable, "-c", STREAMS_CLOSED, str(tmp_path / "file")]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *program], cwd=ROOT, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0
    assert (tmp_path / "file").read_text() == "True ''"


def test_text_of_an_ascii_locale_is_utf8():
    assert text_flag("中国".encode().decode("ascii", "surrogateescape")) == "中国"
    for text in ("中国", "plain", "\udcff"):  # the last is no UTF-8, and refused later
        assert text_flag(text) == text


def test_a_word_without_a_flag_gets_a_hint():
    parser = CommandParser("--input_path")
    parser.add_argument("--input_path", nargs="+")
    with pytest.raises(
        InputError, match="^my.jsonl: a flag is missing; did you mean --input_path my.jsonl b.jsonl[?]$"
    ):
        parser.parse_args(["my.jsonl", "b.jsonl"])
    with pytest.raises(
        InputError, match="^—epochs: begins with a long dash, where two hyphens are expected: --epochs$"
    ):
        parser.parse_args(["—epochs", "3"])
    with pytest.raises(InputError, match="--inputpath: unknown"):
        parser.parse_args(["my.jsonl", "--inputpath"])
