"""Our scripts with input that is wrong: each case a process, and what a good answer to it looks like.

A server imports everything once and forks for each case, so that a case takes milliseconds and its time is that of
the script alone. A case can also be run as a user does, by an interpreter of its own. POSIX only, for want of fork.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import forks

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_LINE = 450  # characters of an error line that a reader still takes in
MOST_MEMORY = 2 << 30  # bytes that a case may hold at its peak
LONGEST_WAIT = 300  # seconds until a case has ended by itself, start-up excluded; with it, `limit` of Scripts.run
SERVE = f"import sys; sys.path[0] = {str(ROOT)!r}; from tests.reliability.scripts import serve; serve()"
ROOM = 6 << 30  # bytes of address space that a case may take beyond the server's: the machine outlives a failed case


@dataclass
class Case:
    """One run of a script."""

    name: str
    arguments: list[str]
    prepare: Callable[[Path], None]  # lays the case's files into its folder, which the script runs in
    expected: Sequence[str]  # for each line of the error, what it must name; empty where no error is due
    script: str = "train.py"
    code: int = 2
    typed: str = ""  # what comes from stdin
    may_write: Sequence[str] = ()  # files that the script may make or change
    seconds: float = 3.0  # of a processor that it may take, start-up excluded: other work beside it counts nothing


@dataclass
class Outcome:
    """What became of a run."""

    code: int  # minus the signal's number where one ended it
    output: str
    error: str
    seconds: float  # of a processor, for the script's main; with the start-up where it ran by its own interpreter
    waited: float  # seconds until it had ended
    peak: int  # bytes of memory


class Scripts:
    """The server: `with Scripts(folder) as scripts: scripts.run(case)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Scripts":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = forks.Popen([sys.executable, "-c", SERVE], env=environment, encoding="utf-8", **pipes)
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=600)
        self._server.stdout.close()

    def run(self, case: Case, own_interpreter: bool = False, limit: float = 60) -> tuple[Outcome, dict, dict]:
        """Run a case in a folder of its own; also what lay in that folder before and after."""
        here = self.folder / "case"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        case.prepare(here)
        before = listing(here)
        asked = {
            "script": case.script, "arguments": case.arguments, "typed": case.typed, "here": str(here),
            "said": str(self.folder), "own_interpreter": own_interpreter, "limit": limit,
        }  # fmt: skip
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline())), before, listing(here)


def listing(folder: Path) -> dict[str, str]:
    """Every path under a folder with what lies there: a file's size and SHA-256, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {os.readlink(path)}"
        elif path.is_file():
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
        else:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "other"
    return found


def faults(case: Case, outcome: Outcome, before: dict, after: dict, own_interpreter: bool) -> list[str]:
    """What is wrong with a run: an empty list is a pass."""
    wrong, error = [], outcome.error
    if outcome.code != case.code:
        wrong.append(f"exit code {outcome.code}, not {case.code}")
    if "Traceback" in error + outcome.output:
        wrong.append(f"a traceback, ending in {error.strip().splitlines()[-1][:200]!r}")
    lines = error_lines(error)
    if len(lines) != len(case.expected):
        wrong.append(f"{len(lines)} lines of errors, not {len(case.expected)}: {' | '.join(lines)[:300]}")
    wrong += [f"no line names {text!r}: {' | '.join(lines)[:300]}" for text in case.expected if not names(lines, text)]
    if lines and max(map(len, lines)) > LONGEST_LINE:
        wrong.append(f"a line of {max(map(len, lines))} characters")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if changed := sorted(name for name in changed if not name.startswith(tuple(case.may_write))):
        wrong.append(f"made or changed {', '.join(changed)}")
    if not own_interpreter and outcome.seconds > case.seconds:
        wrong.append(f"{outcome.seconds:.2f} s, more than {case.seconds:g}")
    if not own_interpreter and outcome.waited > LONGEST_WAIT:
        wrong.append(f"ended after {outcome.waited:.0f} s")
    if outcome.peak > MOST_MEMORY:
        wrong.append(f"{outcome.peak / 2**20:,.0f} MiB of memory")
    return wrong


def error_lines(text: str) -> list[str]:
    """The lines of the errors that a script reported: each `error: ` with what is indented under it."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("error: "):
            lines.append(line.removeprefix("error: "))
            inside = True
        elif inside and line.startswith("       "):
            lines.append(line.strip())
        else:
            inside = False
    return lines


def names(lines: Sequence[str], text: str) -> bool:
    """Whether one of the lines holds the text."""
    return any(text in line for line in lines)


def run_cases(cases: Sequence[Case], folder: Path, scale: str, fast_every: int, own_every: int):
    """Run the cases, and count them.

    Args:
        scale: "full": all of them; "fast": each `fast_every`-th.
        own_every: in "full" each so many-th is run by an interpreter of its own as well.
    """
    from tests.reliability.harness import Counts  # imports torch, which the server does in its own time

    if scale == "fast":
        cases, own_every = cases[::fast_every], 0
    failures, slowest, slow, peak, longest, own = [], 0.0, "", 0, 0, 0
    with Scripts(folder) as scripts:
        for number, case in enumerate(cases):
            runs = [False]
            if own_every and number % own_every == 0 and "\0" not in "".join(case.arguments):  # no shell can say that
                runs.append(True)
            wrong = []
            for own_interpreter in runs:
                outcome, before, after = scripts.run(case, own_interpreter)
                wrong += faults(case, outcome, before, after, own_interpreter)
                own += own_interpreter
                if outcome.seconds > slowest and not own_interpreter:
                    slowest, slow = outcome.seconds, case.name
                peak = max(peak, outcome.peak)
                longest = max([longest, *map(len, error_lines(outcome.error))])
            if wrong:
                failures.append(f"{case.name}: {'; '.join(dict.fromkeys(wrong))}")
    figures = (
        f"at most {slowest:.2f} s of a processor after start-up ({slow}) and {peak / 2**20:,.0f} MiB,"
        f" longest line {longest} characters, {own} also by an interpreter of their own"
    )
    return Counts(len(cases), len(cases) - len(failures), failures, figures)


# --------------------------------------------------------------------------------------------- the server's own code


def serve() -> None:
    """Import what the scripts import, then run a case for each line of JSON on stdin."""
    import jinja2  # noqa: F401
    import torch._dynamo  # noqa: F401  (the first optimizer imports it)

    import inference  # noqa: F401
    import optimized_data_processing  # noqa: F401
    import optimized_pretrain  # noqa: F401
    import train  # noqa: F401
    from model.text.tokenization import encode_texts, load_tokenizer

    encode_texts(load_tokenizer(), ["中"])  # imports what transformers leaves for later
    for line in sys.stdin:
        asked = json.loads(line)
        said = [Path(asked["said"]) / name for name in ("stdin", "stdout", "stderr")]
        said[0].write_text(asked["typed"], encoding="utf-8")
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            run_child(asked, said)
        code, seconds, peak = wait_for(child, start + asked["limit"])
        waited = time.perf_counter() - start
        output, error = (path.read_text(encoding="utf-8", errors="replace") for path in said[1:])
        print(json.dumps(asdict(Outcome(code, output, error, seconds, waited, peak))), flush=True)


def run_child(asked: dict, said: Sequence[Path]) -> None:
    """Become the script: its folder, its streams, its limits. Never returns."""
    import resource

    code = 70
    try:
        os.chdir(asked["here"])
        for number, path in enumerate(said):
            os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        script = str(ROOT / asked["script"])
        if asked["own_interpreter"]:
            resource.setrlimit(resource.RLIMIT_AS, (ROOM + (8 << 30),) * 2)
            os.execv(sys.executable, [sys.executable, script, *asked["arguments"]])
        with contextlib.suppress(OSError, ValueError):  # there is no such figure where there is no /proc
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM,) * 2)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", encoding="utf-8") for n in range(3))
        sys.argv = [script, *asked["arguments"]]
        from utils import run_command

        try:
            run_command(sys.modules[Path(script).stem].main)
        except SystemExit as exit_:
            code = exit_.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, until: float) -> tuple[int, float, int]:
    """Wait for a child, and end it at the time given: (exit code, seconds of a processor, peak memory in bytes)."""
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.perf_counter() > until:
            os.kill(child, 9)
        time.sleep(0.002)
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit
