"""Steps as one captured graph: the bits of launched ones, whatever happens in a run.

Here the graph is the fake one, which is as strict as a real one; `test_cuda.py` has the same for a GPU.
"""

import shutil

import pytest
import torch
import yaml

from model import accelerator
from model.errors import InputError
from model.storage.archive import load_torch
from model.training import step_graph
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests.chat_files import CHATS, write_chats
from tests.fake_graph import FakeGraph
from tests.tiny_runs import assert_same_end, losses, mostly, refused, signal_while_reading, train
from tests.training.test_running_ahead import BAD
from utils import Processes

OPTIONS = {"max_steps": 46, "eval_interval": 11, "save_interval": 20, "log_interval": 1, "max_skipped_steps": 9}
CASES = {
    "adamw, average, accumulation": {"use_ema": "true", "accumulation_steps": 3},
    "adam": {"optimizer_type": "adam", "grad_clip": 0},
    "muon": {"optimizer_type": "muon", "use_ema": "true", "lr_scheduler": "wsd", "dtype": "float32"},
    "documents": {"document_mask": "true", "dtype": "float32", "activation_checkpointing": "full"},
    "experts, bias": {"n_experts": 4, "expert_bias": "true", "balance_loss": 0.01, "expert_products": "grouped"},
    "chats": {"max_seq_len": 96, "use_ema": "true"},
    "lora": {"lora_rank": 4},
    "epochs": {"max_steps": None, "epochs": 8, "batch_size": 150, "log_interval": 3, "dtype": "float32"},
}
SLOW = {*CASES} - {"muon"}  # which has what a step can have; the tests of resuming have accumulation


@pytest.fixture
def graphs(monkeypatch):
    """Puts the fake graph in the place of a CPU's, has the CPU run ahead, and collects the graphs that were made."""
    made = []

    class Noted(FakeGraph):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    monkeypatch.setenv("MATECONV_RUN_AHEAD", "1")
    monkeypatch.setitem(accelerator.GRAPHS, "cpu", Noted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


def spoil(trainer: Trainer, bad: dict[int, str]) -> None:
    """Make steps unusable by what they read, which a replay reads too; they are known by their place among all."""
    order, objective, position = trainer.plan.order, trainer.objective, [0]
    next_step, micro_batches, loss = order.next_step, trainer.stepper._micro_batches, objective.loss
    trained = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)

    def noted(done: int):
        position[0] = done // order.rows_per_step
        return next_step(done)

    def spoiled_batches(samples, number):
        problem = bad.get(position[0])
        factor = {"loss": torch.nan, "spike": 50.0}.get(problem, 1.0)
        for batch in micro_batches(samples, number):
            yield *batch, torch.tensor([factor, float(problem != "gradient")])

    def spoiled_loss(model, batch):
        factor, offset = batch[-1].unbind()
        zero = trained.sum() * 0
        return loss(model, batch[:-1]) * factor + ((zero + offset).sqrt() - offset)  # 0, and its derivative may be NaN

    order.next_step, trainer.stepper._micro_batches, objective.loss = noted, spoiled_batches, spoiled_loss


def assert_same_run(first, second) -> None:
    """The same losses, and the same checkpoints to the last bit."""
    assert losses(first) == losses(second)
    names = sorted(path.name for path in first.glob("checkpoint_step_*.pth"))
    assert names and names == sorted(path.name for path in second.glob("checkpoint_step_*.pth"))
    for name in names:
        assert_same_end(first, second, step=int(name.removeprefix("checkpoint_step_").removesuffix(".pth")))


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(CASES, SLOW))
def test_a_run_has_the_bits_of_launched_steps(flags, tmp_path, tokenizer_folder, case, graphs, capfd):
    options = OPTIONS | CASES[case]
    if case == "chats":
        options["train_data_path"] = write_chats(tmp_path / "chats.bin", CHATS, tokenizer_folder)
    if "lora_rank" in options:
        train(flags(out_dir=tmp_path / "base", max_steps=1))
        options["init_from"] = tmp_path / "base"
    for on in ("false", "auto"):
        trainer = Trainer(build_settings({}, flags(**options, cuda_graph=on, out_dir=tmp_path / on)), Processes())
        spoil(trainer, BAD)
        assert trainer.train() == "finished" and trainer.progress.skipped_steps >= 5
        assert (trainer.stepper.graph is not None) == (on == "auto")
    assert "cuda_graph true (auto)" in capfd.readouterr().err
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["training"]["cuda_graph"] == "auto"
    assert sum(graph.replays for graph in graphs) > 30
    assert_same_run(tmp_path / "false", tmp_path / "auto")


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "options"),
    [
        ("auto", {"optimizer_type": "muon", "accumulation_steps": 2, "dtype": "float32"}),
        pytest.param("false", {"use_ema": "true"}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_same_bits_with_a_graph_and_without(flags, tmp_path, graphs, before, options):
    options = OPTIONS | {"max_steps": 40} | options
    train(flags(**options, cuda_graph=before, out_dir=tmp_path / "whole"))
    for name, after in (("with", "true"), ("without", "false")):
        out_dir = tmp_path / name
        shutil.copytree(tmp_path / "whole", out_dir)
        for path in (out_dir / "checkpoint_step_40.pth", *out_dir.glob("pretrain_32.*")):
            path.unlink()
        trainer = train(flags(**options, cuda_graph=after, out_dir=out_dir, resume="true"))
        assert (trainer.stepper.graph is not None) == (after == "true")
        assert_same_run(tmp_path / "whole", out_dir)


@pytest.mark.long
@pytest.mark.parametrize("micro", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_signal_between_micro_batches_drops_the_step(flags, tmp_path, micro, graphs):
    options = {"accumulation_steps": 3, "use_ema": "true", "eval_interval": 12, "save_interval": 12}
    train(flags(out_dir=tmp_path / "whole", cuda_graph="false", **options))
    trainer = Trainer(build_settings({}, flags(**options)), Processes())

    def the_seventh_is_in_flight() -> None:
        assert graphs[0].replays > 1 and trainer.progress.step == 6

    signal_while_reading(trainer, 7, micro, the_seventh_is_in_flight)
    assert trainer.train() == "interrupted" and trainer.stepper.in_flight is None
    saved = load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"]
    assert saved == len(losses(tmp_path / "out")) == (7 if micro < 2 else 8)  # else no other micro-batch comes after it
    train(flags(resume="true", **options))
    assert_same_end(tmp_path / "whole", tmp_path / "out")


def test_batches_of_several_shapes_each_get_a_graph_up_to_a_limit(flags, tmp_path, graphs, monkeypatch):
    monkeypatch.setattr(step_graph, "MOST_SHAPES", 2)
    ends = []
    for on in ("false", "true"):
        trainer = Trainer(build_settings({}, flags(cuda_graph=on, out_dir=tmp_path / on)), Processes())
        micro_batches = trainer.stepper._micro_batches

        def of_other_lengths(samples, number, trainer=trainer, micro_batches=micro_batches):
            length = 32 - 8 * (trainer.order_calls % 3)
            trainer.order_calls += 1
            for batch in micro_batches(samples, number):
                yield tuple(tensor if tensor is None else tensor[:, :length].contiguous() for tensor in batch)

        trainer.order_calls, trainer.stepper._micro_batches = 0, of_other_lengths
        assert trainer.train() == "finished"
        ends.append(trainer)
    assert sum(graph.replays > 0 for graph in graphs) == 2
    assert_same_run(tmp_path / "false", tmp_path / "true")


# ------------------------------------------------------------------------------------------------- where it goes wrong


@pytest.mark.parametrize("fault", mostly(["waits", "memory", "bits", "room"], slow=["memory", "room"]))
def test_whatever_goes_wrong_in_a_capture_steps_are_launched_with_the_same_bits(
    flags, tmp_path, graphs, fault, capfd, monkeypatch
):
    train(flags(out_dir=tmp_path / "launched", use_ema="true", cuda_graph="false"))
    trainer = Trainer(build_settings({}, flags(out_dir=tmp_path / "out", use_ema="true")), Processes())
    loss, capture, rate = trainer.objective.loss, FakeGraph.capture, torch.ones(())

    def changed_loss(model, batch):
        found = loss(model, batch)
        return found * float(rate) if fault == "waits" else found * rate

    def failing_capture(graph, work):
        result = capture(graph, work)
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation.")
        if fault == "bits":
            rate.mul_(1 + 2**-20)
        return result

    trainer.objective.loss = changed_loss
    monkeypatch.setattr(FakeGraph, "capture", failing_capture)
    if fault == "room":
        monkeypatch.setattr(step_graph, "system_memory", lambda: 500_000)
    if fault == "bits":
        graph, say = trainer.stepper.graph, trainer.stepper.graph._say
        monkeypatch.setattr(graph, "_say", lambda line: (rate.fill_(1.0), say(line)))
    assert trainer.train() == "finished" and trainer.stepper.graph is None
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cuda_graph:")]
    assert len(lines) == 1 and lines[0].startswith("cuda_graph: steps are launched as without it: ")
    expected = {"waits": "waits for the device", "memory": "out of memory", "bits": "other bits than the launched step"}
    expected["room"] = "of the machine's memory, 500 kB are free"
    assert expected[fault] in lines[0]
    assert_same_run(tmp_path / "launched", tmp_path / "out")


IMPOSSIBLE = {
    "dropout 0.1 draws random numbers": {"dropout": 0.1},
    "float16's loss scale": {"dtype": "float16"},
    "a loop over experts waits": {"n_experts": 4, "expert_products": "loop"},
    "the host decides whether each step of sgd counts": {"optimizer_type": "sgd", "learning_rate": 0.1},
}


@pytest.mark.parametrize("problem", IMPOSSIBLE)
def test_a_run_that_cannot_be_captured_says_why(flags, graphs, problem, capfd, new_entries):
    options = IMPOSSIBLE[problem]
    trainer = Trainer(build_settings({}, flags(**options)), Processes())
    assert trainer.stepper.graph is None and f"cuda_graph false (auto): {problem}" in capfd.readouterr().err
    with pytest.raises(InputError, match=f"cuda_graph: true found, but {problem}.*; use auto or false"):
        Trainer(build_settings({}, flags(**options, cuda_graph="true")), Processes())


def test_a_cpu_has_no_graphs(flags, capfd):
    Trainer(build_settings({}, flags()), Processes())
    assert "cuda_graph" not in capfd.readouterr().err
    assert "error: cuda_graph: true found, but no graphs are known" in refused(flags(cuda_graph="true"), capfd)
