"""A case is a run whose disk fails: it is full after some bytes of a checkpoint, read-only, gone, without space from
the start, or returns other bytes than were written. It passes if the older checkpoint keeps every byte, if the message
says what failed (on a full disk, how many bytes were needed and how many could be written), if the run ends with code 2
where its last save failed and with 0 where a later save succeeded, and if the next start leaves no temporary file and
ends with the state of a run whose disk never failed.
"""

import atexit
import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.reliability.harness import Counts, Data, Job, finish, last_line, make_data, run_cases, start
from tests.reliability.states import copy_run, fingerprint, left_lying

TITLE = "Disks that are full, read-only or gone"
OLD, LAST = "checkpoint_step_4.pth", "checkpoint_step_12.pth"
MODULE = "tests.reliability.disks"
TMPFS_BYTES = 16 << 20
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def run(scale: str, folder: Path) -> Counts:
    """20 full disks and 14 other faults; "fast": five of them, one full disk of each kind among these."""
    lab = Lab(folder)
    size = (lab.whole / LAST).stat().st_size
    offsets = [4096 + (size - 8192) * number // 19 for number in range(20)]
    real_tmpfs = can_mount()
    filled = set(offsets[1::4]) if real_tmpfs else set()
    if scale == "fast":
        offsets = offsets[4:6]
    cases = {
        f"full after {offset} bytes ({'tmpfs' if offset in filled else 'limit'})": functools.partial(
            lab.full_tmpfs if offset in filled else lab.limited, number, offset
        )
        for number, offset in enumerate(offsets)
    }
    others = {
        "a file that reads back otherwise": lab.reads_back_otherwise_once,
        "no room at the start": functools.partial(lab.no_room, "room", resume=False),
        "metrics.jsonl cannot be written": lab.metrics_in_the_way,
        "a device that is full": lab.full_device,
        "the folder removed": lab.removed,
        "the folder moved away": lab.moved,
        "the folder replaced by a file": lab.replaced_by_file,
        "its parent replaced by a file": lab.parent_replaced,
        "the last file reads back otherwise": lab.reads_back_otherwise_at_last,
        "what is never pruned": lab.never_pruned,
        "no room at a resume": functools.partial(lab.no_room, "room_resume", resume=True),
    }
    if real_tmpfs:
        others |= {
            "read-only from the start": lab.read_only_at_start,
            "read-only in mid-run": lab.read_only_later,
            "no room on a small tmpfs": lab.small_tmpfs,
        }
    cases |= dict(list(others.items())[: 3 if scale == "fast" else None])
    counts = run_cases(cases)
    on_tmpfs = sum("(tmpfs)" in name for name in cases)
    counts.figures = f"{len(offsets) - on_tmpfs} disks full by a limit on file size, {on_tmpfs} full tmpfs"
    return counts


class Lab:
    """A run that was never disturbed, and others that go on from its first checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole = folder, folder / "whole"
        self.data: Data = make_data(folder / "data")
        finish(self.data.flags(self.whole))
        self.expected = fingerprint(self.whole / LAST)
        self.old = (self.whole / OLD).read_bytes()
        self.needed = re.compile(r"checkpoint_step_8\.pth: cannot be written \(.*: \d+ kB needed, \S+ \w+ could be w")

    def begun(self, name: str) -> Path:
        """A folder in which a run has come to step 4."""
        out = copy_run(self.whole, self.folder / name)
        for later in ("checkpoint_step_8.pth", LAST, "pretrain_32.pth", "pretrain_32.json"):
            (out / later).unlink()
        return out

    def go_on(self, out: Path, setup: list | tuple = (), **flags) -> Job:
        """Resume in real processes; returns when they have ended."""
        values = self.data.flags(out, resume="true", **flags)
        job = start(values, setup=setup)
        job.codes = job.wait()
        return job

    def disturbed(self, out: Path, action: str, **arguments) -> tuple[str, dict]:
        """The setup that lets an action happen while the sixth step of the run is read."""
        return f"{MODULE}:disturb", {
            "action": action,
            "folder": str(out),
            "data_path": str(self.data.train),
            "arguments": arguments,
        }

    def problems(self, job: Job, out: Path, code: int, says: str | re.Pattern, then_resume: bool = True) -> list[str]:
        """What is wrong after a run whose disk failed; `out`: where its files are now."""
        stderr, found = job.stderr(), []
        if job.codes != [code]:
            found.append(f"ended with {job.codes}: {last_line(job)}")
        if "Traceback" in stderr:
            found.append("a traceback")
        if not re.search(says, stderr):
            found.append(f"did not say {getattr(says, 'pattern', says)}: {last_line(job)}")
        if not (out / OLD).exists() or (out / OLD).read_bytes() != self.old:
            found.append("the older checkpoint is not what it was")
        return found + (self.resume_problems(out) if then_resume else [])

    def resume_problems(self, out: Path) -> list[str]:
        """Start again with a disk that works; nothing may be missing in the end."""
        job = self.go_on(out)
        if job.codes != [0]:
            return [f"the next start ended with {job.codes}: {last_line(job)}"]
        left = [f"left lying: {name}" for name in left_lying(out)]
        return left + self.end_problems(out)

    def end_problems(self, out: Path) -> list[str]:
        """Whether a run has ended as the undisturbed one has."""
        if not (out / LAST).exists() or fingerprint(out / LAST) != self.expected:
            return ["the last checkpoint is not that of the undisturbed run"]
        return []

    # ------------------------------------------------------------------------------------------------- full disks

    def limited(self, number: int, offset: int) -> list[str]:
        """No file may grow past so many bytes."""
        out = self.begun(f"limit_{number}")
        job = self.go_on(out, (f"{MODULE}:limit_files", {"size": offset}))
        return self.problems(job, out, 2, self.needed)

    def full_tmpfs(self, number: int, offset: int) -> list[str]:
        """A file system of which somebody else leaves so many bytes while the run is on."""
        out, seen = self.begun(f"tmpfs_{number}"), self.folder / f"tmpfs_{number}_seen"
        setup = [self.on_tmpfs(out, seen), self.disturbed(out, "fill", leave=offset)]
        job = self.go_on(out, setup)
        return self.problems(job, seen, 2, self.needed)

    def on_tmpfs(self, out: Path, seen: Path, size: int = TMPFS_BYTES) -> tuple[str, dict]:
        return f"{MODULE}:private_tmpfs", {"folder": str(out), "size": size, "seen": str(seen)}

    def full_device(self) -> list[str]:
        """The first save goes to /dev/full; the next one makes it good."""
        out = self.begun("device")
        job = self.go_on(out, self.disturbed(out, "device"))
        return self.problems(job, out, 0, self.needed, then_resume=False) + self.end_problems(out)

    # ---------------------------------------------------------------------------------- read-only, gone, in the way

    def read_only_at_start(self) -> list[str]:
        out, seen = self.begun("read_only"), self.folder / "read_only_seen"
        setup = [self.on_tmpfs(out, seen), (f"{MODULE}:make_read_only", {"folder": str(out)})]
        job = self.go_on(out, setup)
        return self.problems(job, seen, 2, "error: out_dir: cannot write to .*Read-only")

    def read_only_later(self) -> list[str]:
        out, seen = self.begun("read_only_later"), self.folder / "read_only_later_seen"
        job = self.go_on(out, [self.on_tmpfs(out, seen), self.disturbed(out, "read_only")])
        return self.problems(job, seen, 2, r"not saved: .*checkpoint_step_8.pth: cannot be written \(Read-only")

    def removed(self) -> list[str]:
        """The saves that follow make the folder again."""
        out = self.begun("removed")
        job = self.go_on(out, self.disturbed(out, "remove"))
        found = [] if job.codes == [0] else [f"ended with {job.codes}: {last_line(job)}"]
        return found + (["a traceback"] if "Traceback" in job.stderr() else []) + self.end_problems(out)

    def moved(self) -> list[str]:
        out, away = self.begun("moved"), self.folder / "moved_away"
        job = self.go_on(out, self.disturbed(out, "move", target=str(away)))
        return self.problems(job, away, 0, "saved ", then_resume=False) + self.end_problems(out)

    def replaced_by_file(self) -> list[str]:
        out, away = self.begun("replaced"), self.folder / "replaced_away"
        job = self.go_on(out, self.disturbed(out, "move", target=str(away), leave_file=True))
        return self.problems(job, away, 2, "checkpoint_step_8.pth: cannot be written")

    def parent_replaced(self) -> list[str]:
        """The folder is reached through a link, as one on a disk that is mounted elsewhere."""
        disk, away, link = self.folder / "disk", self.folder / "disk_away", self.folder / "link"
        disk.mkdir()
        self.begun("begun").rename(disk / "out")
        link.symlink_to(disk / "out")
        job = self.go_on(link, self.disturbed(disk, "move", target=str(away), leave_file=True))
        return self.problems(job, away / "out", 2, "checkpoint_step_8.pth: cannot be written")

    def metrics_in_the_way(self) -> list[str]:
        """A log that cannot be written is told, and is no reason to end a training."""
        out = self.begun("metrics")
        job = self.go_on(out, self.disturbed(out, "folder_for_metrics"))
        says = r"metrics.jsonl: cannot be written \("
        return self.problems(job, out, 0, says, then_resume=False) + self.end_problems(out)

    # ------------------------------------------------------------------------------------------ room at the start

    def no_room(self, name: str, resume: bool) -> list[str]:
        """`shutil.disk_usage` says that little is free; a finished run lies in the folder."""
        out = self.begun(name) if resume else copy_run(self.whole, self.folder / name)
        before = contents(out)
        flags = {"resume": "true"} if resume else {}
        job = start(self.data.flags(out, **flags), setup=(f"{MODULE}:little_free", {"size": 100_000}))
        return self.refused_problems(job, out, before)

    def small_tmpfs(self) -> list[str]:
        out, seen = copy_run(self.whole, self.folder / "small"), self.folder / "small_seen"
        before = contents(out)
        used = sum(-(-len(content) // 4096) * 4096 for content in before.values())
        job = start(self.data.flags(out), setup=self.on_tmpfs(out, seen, used + 200_000))
        return self.refused_problems(job, seen, before)

    def refused_problems(self, job: Job, out: Path, before: dict[str, bytes]) -> list[str]:
        job.codes = job.wait()
        found = [] if job.codes == [2] else [f"ended with {job.codes}: {last_line(job)}"]
        if not re.search(r"error: out_dir: \S+ kB are free in .*needs \S+ [kM]B", job.stderr()):
            found.append(f"did not say what is free and what is needed: {last_line(job)}")
        if "step 1/" in job.stderr() or "Traceback" in job.stderr():
            found.append("it trained, or ended with a traceback")
        after = contents(out)
        return found + [f"{name} is not what it was" for name in before if after.get(name) != before[name]]

    # -------------------------------------------------------------------------------------- reading back, pruning

    def reads_back_otherwise_once(self) -> list[str]:
        """Step 8 does not read back: nothing is removed for it. Step 12 does, and takes its place."""
        out = self.begun("read_back")
        setup = (f"{MODULE}:spoil_once", {"name": "checkpoint_step_8.pth", "seen": str(self.folder / "read_back_seen")})
        job = self.go_on(out, setup, keep_last=1)
        seen = self.folder / "read_back_seen"
        found = self.problems(job, seen, 0, "what was read back is not what was written", then_resume=False)
        if (seen / "checkpoint_step_8.pth").exists():
            found.append("a file that does not read back was put in place")
        return found + self.end_problems(out) + ([OLD + " is still there"] if (out / OLD).exists() else [])

    def reads_back_otherwise_at_last(self) -> list[str]:
        out, seen = self.begun("read_back_last"), str(self.folder / "read_back_last_seen")
        setup = (f"{MODULE}:spoil_once", {"name": "checkpoint_step_8.pth", "seen": seen})
        job = self.go_on(out, setup, keep_last=1, max_steps=8)
        return self.problems(job, out, 2, "error: the last checkpoint could not be saved")

    def never_pruned(self) -> list[str]:
        """With keep_last 1 all but the newest checkpoint goes, and nothing else."""
        out = self.begun("pruned")
        others = ("pretrain_64.pth", "my_checkpoint_step_1.pth", "checkpoint_step_1.pth.old", "checkpoint_step_x.pth")
        for name in others:
            (out / name).write_bytes(b"mine")
        job = self.go_on(out, keep_last=1)
        there = {path.name for path in out.glob("*.pth*")}
        expected = {LAST, "best_model.pth", "pretrain_32.pth", *others}
        found = [] if job.codes == [0] else [f"ended with {job.codes}: {last_line(job)}"]
        return found + [f"{name} is there or missing" for name in sorted(there ^ expected)] + self.end_problems(out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


# ----------------------------------------------------------------------------------------- in the training process


def limit_files(size: int) -> None:
    """No file of this process may grow past so many bytes: writing then fails as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def little_free(size: int) -> None:
    """Let every disk have so many bytes left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=size)


def spoil_once(name: str, seen: str) -> None:
    """Change a byte of a file that was just written, before it is read back, as a failing disk does.

    Args:
        seen: where the folder is copied to when that has been noticed.
    """
    from model.storage import archive

    read_back = archive._read_back

    def spoiled(path: Path) -> None:
        if path.name.startswith(name):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            try:
                read_back(path)
            finally:
                shutil.copytree(path.parent, seen, ignore=shutil.ignore_patterns("*.tmp"))
        else:
            read_back(path)

    archive._read_back = spoiled


def disturb(action: str, folder: str, data_path: str, arguments: dict) -> None:
    """Let one of ACTIONS happen while the second step after a resume is read."""
    from model.dataset import PretrainDataset
    from tests.reliability.faults import wrap

    reads = []

    def before(self, *args, **kwargs):
        if str(self.path) == data_path:
            reads.append(1)
            if len(reads) == 2:
                ACTIONS[action](Path(folder), **arguments)

    wrap(PretrainDataset, "batch", before)


def _fill(folder: Path, leave: int) -> None:
    free = shutil.disk_usage(folder).free
    with open(folder / "of_others", "wb") as file:
        file.write(bytes(max(0, free - leave)))


def _device(folder: Path) -> None:
    from model.storage import files

    def opened(path, *arguments):
        is_checkpoint = Path(path).name.startswith("checkpoint_step_8.pth.") and Path(path).parent == folder
        return open("/dev/full", "wb") if is_checkpoint else open(path, *arguments)

    files.open = opened


def _move(folder: Path, target: str, leave_file: bool = False) -> None:
    folder.rename(target)
    if leave_file:
        folder.write_text("in the way")


def _folder_for_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()


def make_read_only(folder: str | Path) -> None:
    """Put a view of the folder over it that cannot be written."""
    _mount(folder, folder, None, MS_BIND)
    _mount(None, folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


ACTIONS: dict[str, Callable[..., None]] = {
    "fill": _fill,
    "device": _device,
    "read_only": make_read_only,
    "remove": shutil.rmtree,
    "move": _move,
    "folder_for_metrics": _folder_for_metrics,
}


def private_tmpfs(folder: str, size: int, seen: str) -> None:
    """Let a folder lie on a file system of its own, in memory, that only this process sees.

    Args:
        size: of the file system, bytes.
        seen: where its files are copied to at the end of the process.
    """
    before = contents(Path(folder))
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", 0, f"size={size}")
    for name, content in before.items():
        (Path(folder) / name).write_bytes(content)
    atexit.register(shutil.copytree, folder, seen, ignore=shutil.ignore_patterns(".lock", "of_others"))


def _mount(source, target, kind: str | None, flags: int, options: str | None = None) -> None:
    values = [None if value is None else os.fsencode(value) for value in (source, target, kind, options)]
    mount = ctypes.CDLL(None, use_errno=True).mount
    mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    if mount(*values[:3], flags, values[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def can_mount() -> bool:
    """Whether this machine lets a process have a file system of its own (Linux, as root or in a user namespace)."""
    flags = ["-m"] if os.getuid() == 0 else ["-rm"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", *flags, "mount", "-t", "tmpfs", "none", folder]
        try:
            return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False
