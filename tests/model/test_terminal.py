"""What a person types or pastes into a terminal, through a real pseudo-terminal."""

import ast
import os
import select
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX terminal")
LISTEN = """
import time
from model.terminal import prepare_input, read_message
prepare_input()
while (message := read_message("> ")) != "end":
    print(f"got {ascii(message)}.")
    time.sleep(0.3 if message == "slow" else 0)
"""


class Terminal:
    """A process at a terminal: what it prints, and what is typed."""

    def __init__(self, folder, locale: dict[str, str]) -> None:
        import pty

        self.keyboard, terminal = pty.openpty()
        names = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "INPUTRC")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), **locale}
        command, ends = [sys.executable, "-c", LISTEN], {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **ends)
        os.close(terminal)
        self.screen = b""
        self.wait_for(b"> ")

    def wait_for(self, text: bytes, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert select.select([self.keyboard], [], [], max(0, deadline - time.monotonic()))[0], self.screen
            self.screen += os.read(self.keyboard, 4096)

    def send(self, text: str | bytes) -> str:
        """Type a text; the message that was read of it."""
        self.screen = b""
        os.write(self.keyboard, text.encode() if isinstance(text, str) else text)
        self.wait_for(b".\r\n")
        self.wait_for(b"> ")
        shown = self.screen[self.screen.index(b"got ") + 4 :]
        return ast.literal_eval(shown[: shown.index(b".\r\n")].decode())

    def end(self) -> None:
        os.write(self.keyboard, b"end\r")
        assert self.process.wait(600) == 0
        os.close(self.keyboard)


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "xx_XX.UTF-8"}, {"LANG": "C.UTF-8"}, {}])
def test_chinese_is_typed_and_edited_in_any_locale_and_no_files_are_listed(tmp_path, locale):
    for n in range(3):
        (tmp_path / f"file_{n}").touch()
    terminal = Terminal(tmp_path, locale)
    assert terminal.send("中国人民\x7f\x7f你好，好久不见\r") == "中国你好，好久不见"  # two characters deleted
    assert terminal.send("f\t\t\x1b\x1b\x1b?i\r").startswith("f")
    assert set(terminal.send(b"\xe5\xe5\r")) == {"\ufffd"}  # not UTF-8
    assert b"file_" not in terminal.screen
    terminal.end()


@pytest.mark.long
def test_a_paste_of_several_lines_is_one_message(tmp_path):
    terminal = Terminal(tmp_path, {"LC_ALL": "C.UTF-8"})
    assert terminal.send("\x1b[200~第一行\r第二行\r\r第四行\x1b[201~还有\r") == "第一行\n第二行\n\n第四行还有"
    assert terminal.send("单独\r") == "单独"
    assert terminal.send("甲\r乙\r丙\r") == "甲\n乙\n丙"  # a terminal without bracketed paste
    assert terminal.send("\x1b[200~甲\r乙\r\x1b[201~\r").rstrip() == "甲\n乙"
    os.write(terminal.keyboard, b"slow\r")
    time.sleep(0.1)
    assert terminal.send("一\r二\r") == "slow"  # typed during an answer: two messages
    terminal.wait_for(b"\\u4e00'.")
    terminal.wait_for(b"\\u4e8c'.")
    terminal.end()
