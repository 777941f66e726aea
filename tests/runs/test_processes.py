"""What several processes share: decisions of one of them, values that must agree, and who is named when one is lost."""

import subprocess
import sys

import pytest

from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import HUNG, ONE_THREAD, two_ranks

pytestmark = pytest.mark.long

HEAD = """
import os, socket, sys, time
socket.gethostname = lambda: os.environ.get("TEST_HOST", "here")
from model.errors import InputError, ProcessLost
from utils import Processes, run_command
def give_up(message):
    print(message, file=sys.stderr, flush=True)
    os._exit(3)
def main():
    processes = Processes()
    processes.start(timeout=float(os.environ.get("TEST_TIMEOUT", 20)), give_up=give_up)
    rank = processes.rank
"""


def ranks(body, environments=({}, {}), count=2):
    """Run the lines in processes that meet as `count` ranks; each one's exit code, output and errors."""
    port = forks.free_port()
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    code = f"{HEAD}{indented}    processes.close()\nrun_command(main)\n"
    started = [
        forks.Popen(
            [sys.executable, "-c", code],
            env=ONE_THREAD
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | environments[rank],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(environments))
    ]
    ended = [process.communicate(timeout=HUNG) for process in started]
    return [(p.returncode, without_gloo(out), errors) for p, (out, errors) in zip(started, ended, strict=True)]


def without_gloo(output):
    """Without what torch 2.10's gloo prints of its connections."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def test_what_one_rank_decides_all_have():
    body = """
print(processes.decided(lambda: {"decided by": rank}))
print(processes.decided(lambda: None))
processes.check_same("the same thing", (1, "a"))
"""
    assert ranks(body) == [(0, "{'decided by': 0}\nNone\n", "")] * 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("""
def decide():
    raise InputError("no such file")
processes.decided(decide)
""", "no such file"),
        ('processes.check_same("the step", rank + 7)', "the step: rank 1 has 8, rank 0 7; they must agree"),
    ],
)  # fmt: skip
def test_an_error_of_one_rank_is_the_error_of_all(body, message):
    first, second = ranks(body)
    assert first == (2, "", f"error: {message}\n")
    assert second == (2, "", f"[rank 1] error: {message}\n")


def test_without_a_manifest_all_ranks_stop_early_at_the_same_step(flags, token_file, tmp_path):
    alone = tmp_path / "alone.bin"
    alone.write_bytes(token_file.read_bytes())
    # Weights that never change: after the first evaluation none is better.
    options = {"train_data_path": alone, "learning_rate": 1e-30, "batch_size": 2, "dtype": "float32", "ddp_timeout": 30}
    options |= {"early_stopping": "true", "patience": 3}
    result = two_ranks(flags(max_steps=12, **options))
    assert result.returncode == 0 and "finished after step 12" in result.stderr, result.stderr
    result = two_ranks(flags(max_steps=100, resume="true", **options))
    assert result.returncode == 0 and "early stopping after step 16" in result.stderr, result.stderr
    assert "validation data" not in result.stderr


CARD = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
MACHINES = [CARD | {"TEST_HOST": "node-a"}, CARD | {"TEST_HOST": "node-b"}]


@pytest.mark.parametrize(("environments", "name"), [(({}, {}), "rank 1"), (MACHINES, "rank 1 on node-b")])
def test_a_rank_that_dies_is_named_with_its_machine_where_there_are_several(environments, name):
    body = """
if rank == 1:
    processes.beat("reading")
    time.sleep(1.5)
    os._exit(9)
processes.barrier()
"""
    survivor, dead = ranks(body, environments)
    assert dead[0] == 9
    assert survivor == (3, "", f"error: {name} no longer answers (last: reading)\n")


def test_a_rank_that_fails_is_named_with_what_it_said():
    body = """
if rank == 1:
    error = InputError("a bad batch")
    processes.announce(error)
    raise error
processes.barrier()
"""
    survivor, failed = ranks(body, MACHINES)
    assert failed[0] == 2
    assert survivor == (3, "", "error: rank 1 on node-b failed: a bad batch\n")


def test_no_word_in_an_error_makes_a_lost_process_of_it():
    body = 'print(processes.lost(RuntimeError("gloo: Connection reset by peer, NCCL Socket timed out")))'
    assert ranks(body) == [(0, "None\n", "")] * 2


def test_rank_0_leaves_last_with_the_store_that_the_others_ask():
    body = "time.sleep(2.5 * rank)"  # a watchdog asks once a second
    assert ranks(body) == [(0, "", "")] * 2


def test_a_rank_that_never_comes_is_named_with_its_machine():
    alone = {"LOCAL_WORLD_SIZE": "1", "TEST_TIMEOUT": "2"}
    ((code, _, errors),) = ranks("", [alone])
    assert code == 3
    assert "rank 1 (machine 1 of 0 to 1) did not come within 2 s; 2 processes were expected" in errors


def test_a_machine_whose_name_leads_back_to_itself_is_one_line_on_every_rank():
    first, second = ranks("", [{"TEST_HOST": "localhost"}, {"TEST_HOST": "localhost.localdomain"} | CARD])
    for code, _, errors in (first, second):
        assert code == 2 and len(errors.splitlines()) == 1
        assert "localhost: its own name stands for 127.0.0.1, which other nodes cannot reach" in errors


@pytest.mark.slow
def test_a_store_that_torchrun_kept_on_several_nodes_is_one_line():
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "MASTER_PORT": str(store.port)}
    environments = [machine | kept for machine in MACHINES]
    assert [code for code, _, _ in ranks("", environments)] == [0, 0]
    for code, _, errors in ranks("", environments):
        assert code == 2 and len(errors.splitlines()) == 1
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set on each" in errors


def test_processes_that_cannot_connect_say_so_on_every_rank():
    nowhere = {"GLOO_SOCKET_IFNAME": "none0"}
    (code, _, errors), (other_code, _, other_errors) = ranks("", [MACHINES[0], MACHINES[1] | nowhere])
    assert (code, other_code) == (3, 3)
    assert "rank 1 on node-b failed: no connection to the other processes (" in errors
    assert "[rank 1] error: no connection to the other processes (" in other_errors


SLOW = """
for number in range(STEPS):
    with processes.step():
        processes.beat(f"the gradients of step {number + 1}")
        time.sleep(SECONDS)
        processes.barrier()
"""


@pytest.mark.parametrize(
    ("steps", "seconds", "line"),
    [
        (60, "0.1 if rank == 1 else 0.01", "rank 1 on node-b is slow: it works 0.1 s in each step, the others 0.01"),
        (31, "8 if (rank, number) == (1, 30) else 0.01", "the others wait for rank 1 on node-b (the gradients"),
        pytest.param(31, "8 if number == 30 else 0.01", None, marks=pytest.mark.slow),
        (60, "0.1", None),
    ],
    ids=["a rank that always lags", "a rank that lags once", "a step that all take", "equal ranks"],
)  # fmt: skip
def test_the_rank_that_the_others_wait_for_is_named(steps, seconds, line):
    body = SLOW.replace("STEPS", str(steps)).replace("SECONDS", seconds)
    (code, _, said), (other_code, _, other_said) = ranks(body, MACHINES)
    assert (code, other_code, other_said) == (0, 0, "")
    if line is None:
        assert "rank 1" not in said
    else:
        assert len(said.splitlines()) == 1 and line in said


STOPPED = """
import signal, subprocess
def stop():
    later = f"import os, signal, time; time.sleep(9); os.kill({os.getpid()}, signal.SIGCONT)"
    subprocess.Popen([sys.executable, "-c", later])
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0
"""


def test_a_rank_that_stands_still_is_named_while_the_others_wait():
    body = STOPPED + SLOW.replace("STEPS", "31").replace("SECONDS", "stop() if (rank, number) == (1, 30) else 0.06")
    (code, _, said), (other_code, _, _) = ranks(body, MACHINES)
    assert (code, other_code) == (0, 0)
    assert "rank 1 on node-b does not report (last: the gradients of step" in said
