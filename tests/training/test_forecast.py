"""`--dry_run --on 8xH100`: what a run would take on GPUs that are not here, beside what is counted on what is here."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.absent_gpu import absent_gpu, counts_kernels
from model.training.devices import DEVICES, Cluster, Device, parse_cluster
from model.training.forecast import (
    LINK_HOP,
    LINK_REACHED,
    NETWORK_HOP,
    WAYS,
    Group,
    exchanges,
    forecast,
    made_to_fit,
    model_cost,
    neighbours,
    replicas,
    ways_on,
)
from model.training.memory import CLOSE, saved_bytes
from model.training.moving_average import MovingAverage
from model.training.muon import orthogonalization_flops, orthogonalized
from model.training.optimizer import build_optimizer, is_hidden_matrix
from model.training.plan import Hardware
from model.training.settings import build_settings
from tests.conftest import ROOT, random_model
from tests.tiny_runs import ONE_THREAD, TINY, command, exit_code_here, finish_ranks, refused, run, start_ranks, train

CPU = Hardware(torch.device("cpu"), torch.float32, contextlib.nullcontext())
GPU = absent_gpu(torch.bfloat16)
needs_cuda_build = pytest.mark.skipif(not counts_kernels(), reason="this torch was built without CUDA")
WAY = {way.name: way for way in WAYS}
H100 = DEVICES["H100"]
SEVEN_B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 11008, "vocab_size": 32000,
    "max_seq_len": 2048, "tie_embeddings": "false",
}  # fmt: skip


def training(**values):
    return build_settings({}, {name: str(value) for name, value in values.items()}).training


def cost_of(hardware=CPU, config=None, **values):
    return model_cost(config or LMConfig(), training(**values), hardware)


def on(nodes, gpus_per_node, device=H100):
    return Cluster(nodes, gpus_per_node, device, "H100")


# --------------------------------------------------------------------------------------------------------- the devices


def test_gpus_are_named_with_counts_in_front():
    assert parse_cluster("H100") == on(1, 1)
    assert parse_cluster("8xh100").gpus == 8 and parse_cluster("8 x H100").device == H100
    assert (parse_cluster("2x8xH100").nodes, parse_cluster("2x8xH100").gpus) == (2, 16)
    assert parse_cluster("4xMI300X").device == DEVICES["MI300X"]  # its name ends in an x behind a digit
    assert parse_cluster("2×4×rtx 4090").device == DEVICES["RTX4090"]
    assert parse_cluster("8xA100 80GB").device == DEVICES["A100-80GB"]


def test_numbers_stand_for_a_device_that_is_unknown():
    given = Device(80e9, 989e12, 3350e9, 450e9, 0)
    assert parse_cluster("8x80GB,989TF,3350GB/s,450GB/s").device == given
    assert parse_cluster("8x(0.08TB, 0.989pf, 3.35TB/s, 450GB/s)").device == given
    assert parse_cluster("2x8x80GB,989TF,3350GB/s,450GB/s,50GB/s").device == H100


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xH10O", "device 'H10O' is unknown; did you mean H100? known: B200, H200"),
        ("8x4090", "did you mean RTX4090?"),
        ("nonsense", "device 'nonsense' is unknown; known: B200"),
        ("0xH100", "'0xH100' is 0 GPUs, 1 to 1,000,000 expected"),
        ("0x8xH100", "is 0 GPUs"),
        ("9999999x8xH100", "1 to 1,000,000 expected"),
        ("-1xH100", "is unknown"),
        ("8x", "is unknown"),
        ("", "'' found, 8xH100 or, for nodes x GPUs, 2x8xH100 expected; known:"),
        ("9" * 5000 + "xH100", "is unknown"),
        ("8x80GB,989TF", "gives 2 numbers, 8x80GB,989TF,3350GB/s,450GB/s (memory"),
        ("8x80,989TF,3350GB/s,450GB/s", "has '80' for memory, a number above 0 with GB or TB expected"),
        ("8x80GB,0TF,3350GB/s,450GB/s", "has '0TF' for matrix products"),
        ("2x8x80GB,989TF,3350GB/s,450GB/s", "lacks the network per GPU, a fifth number"),
    ],
)
def test_gpus_that_cannot_be_understood_are_one_line(text, says):
    with pytest.raises(InputError) as error:
        parse_cluster(text)
    (line,) = error.value.args
    assert line.startswith("--on: ") and says in line and "\n" not in line


# ---------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_one_device_every_kind_of_memory_is_that_of_the_real_tensors(tiny_config, optimizer_type, dtype):
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    hardware = Hardware(CPU.device, dtype, autocast)
    cost = cost_of(hardware, tiny_config, optimizer_type=optimizer_type, use_ema="true")
    found = forecast(WAY["ddp"], on(1, 1), cost, 3, 1, tiny_config.max_seq_len)

    model = random_model(tiny_config).train()
    optimizer, average = build_optimizer(model, optimizer_type, 1e-3, 0.1), MovingAverage(model, 0.9)
    tokens = torch.zeros(3, tiny_config.max_seq_len, dtype=torch.int64)
    with autocast:
        model(tokens, tokens).backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert found.memory.weights == sum(p.nbytes for p in model.parameters())
    assert found.memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.memory.optimizer == sum(tensor.nbytes for tensor in states)
    assert found.memory.average == sum(p.nbytes for p in average.module.parameters())
    assert found.memory.activations == saved_bytes(model, 3, autocast, False)
    assert found.buffers == 0 and found.together == found.memory.together


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qk_norm": True, "qkv_bias": True}])
def test_parameters_and_flops_are_those_of_the_model(changes):
    config = LMConfig(dim=96, n_layers=5, n_heads=4, n_kv_heads=2, **changes)
    model, cost = Transformer(config), cost_of(config=config, optimizer_type="muon")
    assert (cost.parameters, cost.flops_per_token) == (model.parameter_count(), model.training_flops_per_token())
    matrices = [p.shape for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
    assert cost.update_flops == sum(orthogonalization_flops(*shape) for shape in matrices)
    parts = [
        sum(p.numel() for p in part.parameters()) for part in (model.layers[0].attention, model.layers[0].feed_forward)
    ]
    assert (cost.passing, cost.largest_part) == (5 * sum(parts), max(parts))
    assert cost.matrices == sum(math.prod(shape) for shape in matrices)


def test_each_way_divides_what_it_says():
    cost = cost_of(use_ema="true")
    whole, cluster = cost.memory, on(4, 8)
    held = {way.name: forecast(way, cluster, cost, 1, 1, 512) for way in ways_on(cluster)}
    assert list(held) == ["ddp", "optimizer", "full", "hybrid"]
    kept = 4 * (6400 * 512 + 17 * 512)
    assert [f.memory.weights for f in held.values()] == [
        whole.weights, whole.weights, whole.weights // 32 + kept, whole.weights // 8 + kept
    ]  # fmt: skip
    assert [f.memory.gradients for f in held.values()] == [whole.gradients // n for n in (1, 1, 32, 8)]
    assert [f.memory.optimizer for f in held.values()] == [whole.optimizer // n for n in (1, 32, 32, 8)]
    assert [f.memory.average for f in held.values()] == [whole.average // n for n in (1, 32, 32, 8)]
    in_two = [forecast(WAY[way], cluster, cost, 1, 2, 512).memory.gradients for way in ("full", "hybrid")]
    assert in_two == [whole.gradients, whole.gradients // 8]  # not sent before the last micro-batch; in a node they are
    assert held["ddp"].buffers == held["optimizer"].buffers == whole.gradients
    assert [way.name for way in ways_on(on(1, 8))] == ["ddp", "optimizer", "full"]
    assert [way.name for way in ways_on(on(8, 1))] == ["ddp", "optimizer", "full"]
    assert [way.name for way in ways_on(on(1, 1))] == ["ddp"]


def test_hybrid_divides_by_shard_degree():
    cost, cluster = cost_of(), on(4, 8)
    in_fours, over_nodes = (ways_on(cluster, degree)[-1] for degree in (4, 16))
    assert [way.name for way in ways_on(cluster, 4)] == ["ddp", "optimizer", "full", "hybrid"]
    for way, degree in ((in_fours, 4), (over_nodes, 16)):
        found = forecast(way, cluster, cost, 1, 2, 512)
        assert found.memory.gradients == cost.memory.gradients // degree
        assert found.memory.optimizer == cost.memory.optimizer // degree
    assert neighbours(cluster, 4) == Group(4, 450e9, LINK_HOP)
    assert neighbours(cluster, 16) == Group(16, 8 * 50e9, (7 * LINK_HOP + NETWORK_HOP) / 8)
    assert neighbours(on(3, 4), 3) == Group(3, 50e9, NETWORK_HOP)  # the second has one on the first node
    assert replicas(cluster, 4) == Group(8, 2 * 50e9, (LINK_HOP + NETWORK_HOP) / 2)  # two on each node
    assert replicas(cluster, 8) == Group(4, 50e9, NETWORK_HOP) and replicas(cluster, 16).size == 2
    assert replicas(on(1, 8), 2) == Group(4, 450e9, LINK_HOP)
    assert ways_on(cluster, 8)[-1].shards(cluster) == WAY["hybrid"].shards(cluster) == 8
    assert [way.name for way in ways_on(on(1, 8), 4)] == ["ddp", "optimizer", "full", "hybrid"]  # on one node too
    assert [way.name for way in ways_on(on(1, 8), 8)] == ["ddp", "optimizer", "full"]
    assert [way.name for way in ways_on(on(1, 1), 4)] == ["ddp"]
    with pytest.raises(InputError, match="shard_degree: 3 does not divide the 32 GPUs; give one that does"):
        ways_on(cluster, 3)


def test_the_largest_micro_batch_fits_and_one_row_more_does_not():
    cost, small = cost_of(), Cluster(1, 2, Device(4e9, 1e12, 1e11, 1e10, 0), "small")
    most = forecast(WAY["ddp"], small, cost, 1, 1, 512).most_rows
    fits = [forecast(WAY["ddp"], small, cost, rows, 1, 512) for rows in (most, most + 1)]
    assert most > 1 and [f.fits for f in fits] == [True, False] and fits[1].most_rows == most
    assert fits[0].together <= CLOSE * 4e9 < fits[1].together
    assert forecast(WAY["ddp"], Cluster(1, 1, Device(1e8, 1e12, 1e11, 1e10, 0), "tiny"), cost, 1, 1, 512).most_rows == 0


def test_what_does_not_fit_is_made_to_in_smaller_micro_batches_of_the_same_step():
    cost, small = cost_of(), Cluster(1, 2, Device(4e9, 1e12, 1e11, 1e10, 0), "small")
    most = forecast(WAY["ddp"], small, cost, 1, 1, 512).most_rows
    asked = forecast(WAY["ddp"], small, cost, 4 * most, 3, 512)
    made = made_to_fit(asked, small, cost, 512)
    assert not asked.fits and made.fits and (made.rows, made.micro_batches) == (most, 12)
    assert made.computing == pytest.approx(asked.computing) and made.exchanging == asked.exchanging
    assert made_to_fit(made, small, cost, 512) is made
    tiny = Cluster(1, 2, Device(1e8, 1e12, 1e11, 1e10, 0), "tiny")
    assert made_to_fit(forecast(WAY["ddp"], tiny, cost, 8, 1, 512), tiny, cost, 512) is None


@needs_cuda_build
def test_without_cuda_in_torch_a_cpus_kernels_are_counted_which_keep_a_little_more(monkeypatch):
    shapes = LMConfig(), LMConfig(dim=1024, n_layers=3, n_heads=8, n_kv_heads=8, vocab_size=32000, max_seq_len=1024)
    exact = [cost_of(GPU, config).activations_per_row for config in shapes]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    about = [cost_of(absent_gpu(GPU.dtype), config).activations_per_row for config in shapes]
    assert all(1 < more / least < 1.2 for more, least in zip(about, exact, strict=True))


@needs_cuda_build
def test_a_gpu_that_is_not_here_keeps_no_square_of_scores():
    """Four times the tokens take four times the memory, but for a mask, which is a square."""

    def growth(**values):
        short, long = (cost_of(GPU, LMConfig(max_seq_len=n), **values).activations_per_row for n in (512, 2048))
        return long / short

    assert growth() == pytest.approx(4, rel=1e-3) and growth(document_mask="true") > 4.3


@needs_cuda_build
@pytest.mark.parametrize(
    ("config", "rows", "peak"),
    [(LMConfig(), 32, 4.9e9), (LMConfig(dim=768, n_layers=16, max_seq_len=1024), 16, 12.1e9)],
)
def test_the_peak_that_was_measured_on_an_h100_lies_within_the_fifth_that_is_left_free(config, rows, peak):
    """benchmarks/RESULTS.md, eager, AdamW: in its table the peak of a step."""
    together = forecast(WAY["ddp"], on(1, 1), cost_of(GPU, config), rows, 1, config.max_seq_len).together
    assert together < peak < together / CLOSE


# -------------------------------------------------------------------------------------------------------- the exchange

COUNT = """
import json, sys
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from model.training.plan import Hardware
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from utils import Processes

def written():
    return int(open("/proc/self/io").read().split("wchar: ")[1].split()[0])

buckets = []
def count(state, bucket):
    buckets.append(bucket.buffer().nbytes)
    return allreduce_hook(state, bucket)

trainer = Trainer(build_settings({}, json.loads(sys.argv[1])), Processes())
trainer.parallel.called.register_comm_hook(None, count)
trainer.measure_steps(0, 1)
buckets.clear()
before = written()
trainer.measure_steps(0, 1)
print(json.dumps([sum(buckets), written() - before]))
trainer.processes.close()
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_exchanged_in_as_many_bytes_as_were_said(flags, processes):
    """In what DistributedDataParallel hands over exactly; and as each process writes it, by Linux's count."""
    shape = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 32}
    given = flags(**shape, accumulation_steps=2, ddp="true", device="cpu", dtype="float32", attention="pytorch")
    started = start_ranks(processes, [sys.executable, "-c", COUNT, json.dumps(given)], cwd=ROOT)
    result = finish_ranks(started)
    assert result.returncode == 0, result.stderr
    counted = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[") and "Gloo" not in line]
    cost = cost_of(config=LMConfig(**shape, vocab_size=300))
    (found,) = exchanges(WAY["ddp"], on(1, processes), cost, 2)
    assert [buckets for buckets, _ in counted] == [cost.memory.gradients] * processes
    if Path("/proc/self/io").exists():
        assert [sent for _, sent in counted] == [pytest.approx(found.bytes, rel=0.01)] * processes


COUNT_SHARED = """
import collections, json, sys
from torch.utils._python_dispatch import TorchDispatchMode
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from utils import Processes

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1] if str(function).startswith("c10d.") else ""
        whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "alltoall_base_": 1}  # which argument is the larger
        if name in whole:
            sent[name] += args[whole[name]].nbytes
        if name == "allreduce_" and args[0][0].numel() > 1000:
            sent[name] += args[0][0].nbytes
        return function(*args, **(kwargs or {}))

sent = collections.Counter()
trainer = Trainer(build_settings({}, json.loads(sys.argv[1])), Processes())
trainer.measure_steps(0, 1)
with Count():
    trainer.measure_steps(0, 1)
if trainer.processes.rank == 0:
    print(json.dumps(sent))
trainer.processes.close()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "shard", "micro_batches"),
    [
        pytest.param(2, "full", 1, marks=pytest.mark.slow),
        (2, "full", 2),
        pytest.param(4, "hybrid", 2, marks=pytest.mark.slow),
    ],
)
def test_shared_weights_and_gradients_are_exchanged_in_as_many_bytes_as_were_said(
    flags, processes, shard, micro_batches, monkeypatch
):
    """As PyTorch hands them to its collectives, where all is divided evenly; matrices of Muon evenly but for one."""
    shape = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 32}
    monkeypatch.setitem(ONE_THREAD, "MATECONV_EMULATE_DTYPE", "1")
    options = {"optimizer_type": "muon", "dtype": "bfloat16", "shard": shard, "batch_size": 1}
    options |= {"shard_degree": 2} if shard == "hybrid" else {}
    given = flags(**shape, **options, accumulation_steps=micro_batches, ddp="true", device="cpu")
    started = start_ranks(processes, [sys.executable, "-c", COUNT_SHARED, json.dumps(given)], cwd=ROOT)
    result = finish_ranks(started)
    assert result.returncode == 0, result.stderr
    sent = next(json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    hardware = Hardware(CPU.device, torch.bfloat16, torch.autocast("cpu", torch.bfloat16))
    cost = cost_of(hardware, LMConfig(**shape, vocab_size=300), optimizer_type="muon")
    found = [e.bytes for e in exchanges(WAY[shard], on(processes // 2, 2), cost, micro_batches)]
    # Of a gathered whole, a rank sends as many copies of its share as there are others: half of it, where two share.
    assert sent["_allgather_base_"] / 2 == found[0]
    assert sent["_reduce_scatter_base_"] / 2 == found[1]
    assert sent.get("allreduce_", 0) == (0 if shard == "full" else found[2])  # of two, each sends all of its share
    assert sent["alltoall_base_"] / 2 == pytest.approx(found[-1], rel=0.2)


def test_what_is_sent_is_what_is_worked_out_by_hand():
    """1B parameters on one node, 7B on 125: the gigabytes of float32 gradients and 16-bit weights."""
    layers, one_node = LMConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5632), on(1, 8)
    cost = cost_of(GPU, layers)
    n = cost.parameters
    assert n == pytest.approx(1.25e9, rel=0.01)

    def sent(way, cluster, micro_batches=1):
        return [e.bytes for e in exchanges(WAY[way], cluster, cost, micro_batches)]

    assert sent("ddp", one_node) == [pytest.approx(2 * 4 * n * 7 / 8)]
    assert sent("ddp", one_node, 4) == sent("ddp", one_node)  # once a step
    assert sent("optimizer", one_node) == pytest.approx([2 * 4 * n * 7 / 8, 4 * n * 7 / 8])
    weights = 2 * 2 * cost.passing + 4 * (n - cost.passing)  # 16 bits twice, embedding and norms once in 32
    assert sent("full", one_node) == pytest.approx([weights * 7 / 8, 4 * n * 7 / 8])
    assert sum(sent("full", one_node)) == pytest.approx(sum(sent("ddp", one_node)))
    assert sent("full", one_node, 4) == pytest.approx([4 * weights * 7 / 8, 4 * n * 7 / 8])
    assert sent("hybrid", on(125, 8)) == pytest.approx([weights * 7 / 8, 4 * n * 7 / 8, 2 * 4 * n / 8 * 124 / 125])
    muon = cost_of(GPU, layers, optimizer_type="muon")
    rows = exchanges(WAY["full"], one_node, muon, 1)[-1]  # each GPU's share of the matrices, there and back
    assert rows.bytes == pytest.approx(2 * 4 * muon.matrices / 8 * 7 / 8)
    assert sent("ddp", on(1, 1)) == []


def test_an_exchange_takes_the_time_of_its_slowest_link_and_of_its_hops():
    cost, far = cost_of(), Device(80e9, 989e12, 3350e9, 450e9, 5e9)
    within, between = (exchanges(WAY["full"], cluster, cost, 1)[0] for cluster in (on(1, 8), on(2, 8, far)))
    hops = 33 * 7, 33 * 15  # 16 attentions and feed-forwards twice, all else once
    assert within.seconds == pytest.approx(within.bytes / (LINK_REACHED * 450e9) + hops[0] * 3.4e-6)
    assert between.seconds == pytest.approx(between.bytes / (LINK_REACHED * 40e9) + hops[1] * (7 * 3.4e-6 + 14e-6) / 8)
    assert within.exposed(computing=1.0) == 0 and within.exposed(computing=0.0) == within.seconds
    gradients = exchanges(WAY["ddp"], on(1, 8), cost, 4)[0]  # hide behind the backward pass of the last of four
    assert gradients.exposed(3 * gradients.seconds) == pytest.approx(gradients.seconds / 2)


def test_the_products_of_muon_are_those_that_it_computes():
    with FlopCounterMode(display=False) as counter:
        for shape in ((96, 32), (32, 96)):
            orthogonalized(torch.randn(1, *shape), torch.float32)
    assert counter.get_total_flops() == 2 * orthogonalization_flops(32, 96)


def test_sharing_the_update_pays_with_muon_before_memory_asks_for_it():
    """24 layers of 2,048 in steps of half a million tokens on 8 GPUs: every rank repeats it, 17 % of the computing."""
    layers = LMConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5632)
    cost = cost_of(GPU, layers, optimizer_type="muon")
    found = forecast(WAY["ddp"], on(1, 8), cost, 16, 2, 2048)
    assert 0.1 < found.updating / found.computing < 0.25
    assert forecast(WAY["optimizer"], on(1, 8), cost, 16, 2, 2048).updating == pytest.approx(found.updating / 8)


# ------------------------------------------------------------------------------------------------------------ the page


@needs_cuda_build
def test_the_page_says_what_fits_and_what_to_choose(flags, tmp_path, capfd):
    shape = SEVEN_B | {"batch_size": 4, "max_steps": 1000}
    assert exit_code_here(flags(**shape), "--dry_run", "--on=2x8xH100") == 0
    told = capfd.readouterr().out
    lines = {line.split("  ")[0].strip(): line.split() for line in told.splitlines()}
    assert "6,738,415,616" in told and "16 x H100: 2 nodes of 8" in told
    assert lines["each GPU holds"][-4:] == ["ddp", "optimizer", "full", "hybrid"]
    assert lines["fits in 80% of memory"][-4:] == ["no", "no", "yes", "no"]
    assert "choose full: it fits (" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gpus", "changes", "says"),
    [
        ("125x8xH100", SEVEN_B, "choose hybrid: with batch_size 2 and accumulation_steps 2, the same step, it fits ("),
        ("8xT4", SEVEN_B, "choose a smaller model or larger GPUs: no way fits one sample into 80% of their memory"),
        ("8xT4", {}, "dtype       float16, since it has no bfloat16"),
        ("8xT4", {"dtype": "float32"}, "float32; the FLOP/s are of 16 bits"),
        ("H100", {}, "\nit fits ("),
        ("8xAscend910B", {}, "Ascend910B was tried with a simulated device only"),
        (
            "2x8xH100",
            {"shard": "hybrid", "shard_degree": 4},
            "hybrid: as full among 4 neighbouring GPUs; such groups are",
        ),
        ("2x8x80GB,989TF,3350GB/s,450GB/s,50GB/s", {}, "16 x 80GB,989TF,3350GB/s,450GB/s,50GB/s: 2 nodes of 8"),
    ],
)
def test_what_the_page_says_of_other_gpus(flags, capfd, gpus, changes, says):
    assert exit_code_here(flags(**changes), "--dry_run", f"--on={gpus}") == 0
    told = capfd.readouterr().out
    assert says in told and ("for the exchange" in told) == (gpus != "H100")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one program is read as Linux tells it")
def test_a_machine_that_could_not_hold_the_model_describes_it(flags):
    """A 7B model takes 108 GB with AdamW; the page less than what torch itself takes."""
    # getrusage would also tell the peak of this process, which starts it.
    script = "import sys; sys.argv = sys.argv[1:]; import train; from utils import run_command\n"
    script += (
        "try: run_command(train.main)\nfinally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    arguments = [*command(flags(**SEVEN_B))[1:], "--dry_run", "--on=8x8xH100"]
    result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 2e6  # kilobytes


@pytest.mark.long
def test_steps_come_from_the_data_or_from_max_steps_or_are_unknown(flags, tmp_path, capfd):
    def steps(**changes):
        assert exit_code_here(flags(**changes), "--dry_run", "--on=H100") == 0
        return next(line for line in capfd.readouterr().out.splitlines() if line.startswith("steps"))

    trained = train(flags(max_steps=None, epochs=1, eval_steps=1, eval_interval=1000))
    capfd.readouterr()
    assert f" {trained.progress.step:,}: " in steps(max_steps=None, epochs=1)
    missing = tmp_path / "none.bin"
    assert " 12: 1.5k tokens" in steps(train_data_path=missing)
    line = steps(train_data_path=missing, max_steps=None)
    assert f"unknown: there is no {missing}, and max_steps is null; give one of them" in line


@pytest.mark.long
def test_a_checkpoint_is_as_large_as_was_said(flags, tmp_path):
    shape = {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3}
    train(flags(**shape, max_steps=1, save_interval=1, use_ema="true"))
    cost = cost_of(config=LMConfig(**shape, vocab_size=300, max_seq_len=32), use_ema="true")
    memory = cost.memory
    size = (tmp_path / "out" / "checkpoint_step_1.pth").stat().st_size
    assert memory.weights + memory.average + memory.optimizer == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({}, ["--dry_run", "--on=8xH10O"], "did you mean H100?"),
        ({}, ["--dry_run", "--on=0xH100"], "0 GPUs"),
        ({"shard": "hybrid", "shard_degree": 3}, ["--dry_run", "--on=8xH100"], "3 does not divide the 8 GPUs"),
        ({}, ["--on=8xH100"], "goes with --dry_run only"),
        ({}, ["--dry_run", "--on=H100", "--nproc_per_node=2"], "omit torchrun and --nproc_per_node"),
        ({"resume": "true"}, ["--dry_run", "--on=H100"], "omit --init_from and --resume"),
        (dict.fromkeys(TINY, None) | {"init_from": "x.pth"}, ["--dry_run", "--on=H100"], "omit --init_from and"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(flags, capfd, changes, more, says):
    assert says in refused(flags(**changes), capfd, *more)


@pytest.mark.long
def test_a_config_without_numbers_gets_them(flags):
    result = run(command(flags(batch_size="auto", epochs="auto", max_steps=None), "--dry_run", "--on=8xRTX4090"))
    assert result.returncode == 0 and "auto" not in result.stdout, result.stderr
