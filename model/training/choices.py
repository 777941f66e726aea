"""What `auto` resolves to in a run's settings: chosen once by the recipe, printed with the reason, kept on resuming."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from model import accelerator
from model.attention import VARLEN, has_ways
from model.document_attention import problem_on
from model.errors import InputError, counted
from model.experts import grouping_problem
from model.LMConfig import LMConfig
from model.model import Transformer
from model.options import parse_value
from model.storage.files import size_text
from model.training.attention_trial import fastest_attention
from model.training.data import TrainingData
from model.training.experts_trial import fastest_products
from model.training.joined_trial import joined_is_faster
from model.training.memory import divided_rows_that_fit, free_memory, rows_that_fit, state_bytes
from model.training.recipe import (
    ADAPTERS_TIMES,
    PREFERENCE_SHARE,
    TUNING_SHARE,
    all_should_write,
    automatic_balance_loss,
    automatic_batch_size,
    automatic_epochs,
    automatic_learning_rate,
    automatic_shard,
    automatic_tokens_per_step,
    automatic_warmup,
    batch_text,
    compile_pays,
    cpp_compiler,
    value_text,
)
from model.training.settings import AUTO, FIELDS, FULLY_SHARDED, TrainingSettings, of_no_experts

# What pays on one kind of device need not on another.
OF_A_DEVICE = ("compile", "attention", "joined_products", "expert_products")
T = TypeVar("T")
V = TypeVar("V", int, float, bool, int | None)


class FoundCheckpoint(NamedTuple):
    """The checkpoint that a run resumes from."""

    path: Path
    content: dict  # see model/runs/checkpoint.py


class Ranks(Protocol):
    """The processes that train together, as far as this room needs them (`utils.Processes`)."""

    rank: int
    world_size: int
    local_world_size: int

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank."""

    def smallest(self, value: float) -> float:
        """The smallest of all processes' values."""

    def all_sum(self, values: list[float]) -> list[float]:
        """The sums of all processes' values."""

    def beat(self, doing: str, patience: float) -> None:
        """Report progress to the watchdog."""

    def arrive(self) -> None:
        """Report to the watchdog that from here this process waits for the others."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""

    def sum_on_device(self, numbers: Tensor) -> None:
        """Add a tensor up over all processes, in place."""

    def gather_on_device(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """Start to gather the processes' parts; returns what waits for them."""

    def send_to_main(self, source: int, part: Tensor | None, target: Tensor | None) -> None:
        """Copy a tensor of one process into one of rank 0."""


def weight_shards(training: TrainingSettings, ranks: Ranks) -> int:
    """Among how many ranks a copy of the weights is divided; 1: each rank has all of them.

    Raises:
        InputError: the ranks cannot be divided so.
    """
    if ranks.world_size == 1 or training.shard not in FULLY_SHARDED:
        return 1
    if training.shard == "full":
        return ranks.world_size
    degree = training.shard_degree or ranks.local_world_size
    if degree == 1:
        raise InputError("shard: hybrid found, but each machine has one process; give shard_degree, or use shard full")
    if ranks.world_size % degree:
        raise InputError(f"shard_degree: {degree} does not divide the {ranks.world_size} processes; give one that does")
    return degree


class Choices:
    """Says what a setting's value is: the user's or, where that is `auto`, one that is chosen here.

    A resumed run takes its checkpoint's values: a new measurement could give others, and so another run.

    Attributes:
        made: the values chosen, by name, as a checkpoint keeps them.

    Args:
        training: the settings' section, as the user gave it.
        found: the checkpoint that the run resumes from.
        processes: those that train together; all of them choose the same values.
        device: that this process computes on.
        say: prints one line for the user.

    Raises:
        InputError: the checkpoint's choices are not valid settings; or `compile` is true and torch finds no compiler.
    """

    def __init__(
        self,
        training: TrainingSettings,
        found: FoundCheckpoint | None,
        processes: Ranks,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._training, self._processes, self._device, self._say = training, processes, device, say
        self.made: dict[str, int | float | bool] = {}
        self._earlier = {} if found is None else self._of_checkpoint(*found)
        if training.compile is True and device.type == "cpu" and cpp_compiler() is None:
            raise InputError(
                "compile: true found, but torch.compile needs a C++ compiler on a CPU and finds none (g++, or what the"
                " variable CXX names; cl on Windows); install one, or use --compile false"
            )

    def _of_checkpoint(self, path: Path, checkpoint: Mapping) -> dict:
        chosen = checkpoint.get("chosen", {})  # missing in older checkpoints
        try:
            values = {name: parse_value(FIELDS[name], value) for name, value in chosen.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its values for auto are invalid; use an older checkpoint") from error
        values.setdefault("joined_products", False)  # older runs computed each apart
        if checkpoint["environment"].get("device") != self._device.type:
            for name in OF_A_DEVICE:
                values.pop(name, None)
        return values

    def _settle(self, name: str, choose: Callable[[], tuple[V, str]]) -> V:
        """A setting's value: if it is auto, the checkpoint's, or else what `choose` returns; says which, and why."""
        if (given := getattr(self._training, name)) != AUTO:
            return given
        value, why = (self._earlier[name], "as before") if name in self._earlier else choose()
        value = self._processes.decided(lambda: value)
        self.made[name] = value
        self._say(f"{name} {value_text(value)} (auto): {why}")
        return value

    def epochs(self, data: TrainingData, parameters: int) -> int:
        """What the kind of data and their number call for.

        Args:
            parameters: of the model that compute a token.
        """
        kind = "pairs" if data.is_pairs else "chats" if data.is_chat else "texts"
        tokens = data.training_samples * data.config.max_seq_len
        return self._settle("epochs", lambda: automatic_epochs(kind, tokens, parameters))

    def shard(self, model: Transformer) -> tuple[str, int]:
        """What ranks share, and how many share one copy. A checkpoint does not keep it: a resumed run, whose ranks may
        be fewer or more, chooses again."""
        t, processes = self._training, self._processes
        if processes.world_size == 1:
            if t.shard not in (AUTO, "none"):
                self._say(f"shard {t.shard}: there is one process, so nothing is shared")
            return "none", 1
        if (shards := weight_shards(t, processes)) > 1:
            return t.shard, shards
        shard = t.shard
        if shard == AUTO:
            free = int(processes.smallest(free_memory(self._device, processes.local_world_size)))
            shard, why = automatic_shard(t.optimizer_type, state_bytes(model, t), free, processes.world_size)
            self._say(f"shard {shard} (auto): {why}")
        return shard, processes.world_size if shard == "optimizer" else 1

    def writers(self, shards: int, checkpoint_bytes: int) -> int:
        """How many ranks write a checkpoint: one or all of them. As `shard`, a resumed run chooses it again."""
        t, processes = self._training, self._processes
        if processes.world_size == 1:
            if t.checkpoint_writers == "all":
                self._say("checkpoint_writers all: there is one process, which writes one file")
            return 1
        writers = t.checkpoint_writers
        if writers == AUTO:
            several_machines = processes.world_size > processes.local_world_size
            writers = "all" if all_should_write(shards > 1, several_machines, checkpoint_bytes) else "one"
            if writers == "all":
                size = size_text(checkpoint_bytes)
                self._say(f"checkpoint_writers all (auto): a checkpoint has {size}, of which each rank writes its part")
        return processes.world_size if writers == "all" else 1

    def batch_size(self, model: Transformer, data: TrainingData, epochs: int, autocast, shards: int) -> int:
        """What the number of tokens calls for, as far as memory allows: measured on the model or, where ranks share it,
        counted.

        Args:
            shards: ranks that share one copy of what they share.

        Raises:
            InputError: not even one sample fits.
        """
        return self._settle("batch_size", lambda: self._choose_batch_size(model, data, epochs, autocast, shards))

    def _choose_batch_size(
        self, model: Transformer, data: TrainingData, epochs: int, autocast, shards: int
    ) -> tuple[int, str]:
        t, processes, length = self._training, self._processes, data.config.max_seq_len
        parts = t.accumulation_steps * processes.world_size
        samples = data.training_samples
        tokens, why = automatic_tokens_per_step(samples * length, epochs, t.max_steps)
        wanted = automatic_batch_size(tokens, length * parts, max(1, samples // parts), None)
        processes.beat("measuring how large a batch fits the memory", 3)
        beside = state_bytes(model, t, shards)
        if accelerator.kind_of(self._device).shares_memory:  # the copy that is being saved takes it too, whole
            beside += state_bytes(model, t) + sum(parameter.nbytes for parameter in model.parameters())
        free = free_memory(self._device, processes.local_world_size)
        measuring = "measuring how large a batch fits the memory"
        with_documents = t.document_mask or data.is_chat
        if t.shard in FULLY_SHARDED and shards > 1:
            divided = dataclasses.replace(t, document_mask=with_documents)
            fits = divided_rows_that_fit(data.config, divided, self._device, autocast, shards, free, beside)
        else:
            fits = rows_that_fit(
                model, autocast, wanted, beside, free, with_documents, lambda: processes.beat(measuring, 3)
            )
        fits = int(processes.smallest(fits))
        if fits == 0:
            raise InputError(
                f"batch_size: auto found, but not even one sample of {length} tokens fits 60 % of the free memory"
                f" ({free / 1e9:.1f} GB); use a smaller model or max_seq_len"
            )
        rows = automatic_batch_size(tokens, length * parts, max(1, samples // parts), fits)
        at_least = "at least " if accelerator.measures_peak(self._device) else ""
        memory = f"memory holds {at_least}{counted(fits, 'sample')}"
        if fits < wanted:
            memory = (
                f"{wanted:,} would be better, but memory holds no more; accumulation_steps {-(-wanted // fits)} helps"
            )
        return (
            rows,
            f"{batch_text(rows, t.accumulation_steps, processes.world_size)} x {length} tokens, {why}; {memory}",
        )

    def attention(self, data: TrainingData, rows: int, dtype: torch.dtype) -> None:
        """The fastest way for this machine and these shapes, tried; where documents are told apart, one that skips the
        others, since PyTorch's kernels with a mask compute all of the square.

        Args:
            rows: samples that a process reads at once.
            dtype: of the matrix products.

        Raises:
            InputError: `varlen` is asked for, and can't be had.
        """
        config, with_documents = data.config, self._training.document_mask or data.is_chat
        tells_apart = with_documents and not data.is_pairs
        if self._training.attention == VARLEN and (problem := self._varlen_problem(config, dtype, tells_apart)):
            raise InputError(f"attention: varlen found, but {problem}; use auto")
        if self._earlier.get("attention") == VARLEN and self._varlen_problem(config, dtype, tells_apart):
            del self._earlier["attention"]  # another dtype, or another GPU
        if accelerator.kind_of(self._device).has_flash_kernels and tells_apart:
            self._settle("attention", lambda: self._with_documents(config, dtype))
        elif not has_ways(config.flash_attn, self._device, config.max_seq_len, config.dropout):
            self.made["attention"] = "pytorch"
        elif with_documents:
            self._settle("attention", lambda: ("chunks", "documents are told apart"))
        else:
            self._settle("attention", lambda: fastest_attention(config, rows, dtype))

    def _with_documents(self, config: LMConfig, dtype: torch.dtype) -> tuple[str, str]:
        """Of a GPU."""
        if (problem := self._varlen_problem(config, dtype, True)) is not None:
            return "pytorch", f"with a mask, since {problem}"
        return VARLEN, "other documents are skipped"

    def _varlen_problem(self, config: LMConfig, dtype: torch.dtype, tells_apart: bool) -> str | None:
        """Why attention can't skip other documents on this device; None: it can."""
        if not accelerator.kind_of(self._device).has_flash_kernels:
            return f"{self._device.type} has no such kernels"
        if not tells_apart:
            return "no documents are told apart (document_mask), or pairs are trained on"
        if config.dropout or not config.flash_attn or dtype != torch.bfloat16:
            return "its kernels need dtype bfloat16, flash_attn and no dropout"
        problem = problem_on(self._device, config.n_heads, config.n_kv_heads, config.head_dim)
        return problem and f"its kernels fail here ({problem})"

    def joined_products(self, config: LMConfig, rows: int, dtype: torch.dtype) -> None:
        """The faster way for this GPU and these shapes, tried; on a CPU both take the same time.

        Args:
            rows: samples that a process reads at once.
            dtype: of the matrix products.
        """
        is_gpu = accelerator.kind_of(self._device).has_flash_kernels
        if self._training.joined_products == AUTO and (self._training.lora_rank or not is_gpu):
            self.made["joined_products"] = False
        else:
            self._settle("joined_products", lambda: joined_is_faster(config, rows, dtype, self._device))

    def expert_products(self, config: LMConfig, rows: int, dtype: torch.dtype) -> None:
        """The faster way for this machine and these shapes, tried on a CPU. A GPU that has PyTorch's kernel takes it,
        since a loop waits for the numbers of rows; other devices take the loop.

        Args:
            rows: samples that a process reads at once.
            dtype: of the matrix products.

        Raises:
            InputError: PyTorch's kernel is asked for, and does not take these shapes.
        """
        if not config.n_experts:
            self.made["expert_products"] = "loop"
        elif (problem := grouping_problem(config)) is not None:
            if self._training.expert_products == "grouped":
                raise InputError(f"expert_products: grouped found, but {problem}; use loop or auto")
            self._earlier.pop("expert_products", None)  # of another torch
            self._settle("expert_products", lambda: ("loop", problem))
        elif self._device.type == "cpu" and dtype != torch.float32:
            if self._settle("expert_products", lambda: ("loop", "a CPU's only way in 16 bits")) == "grouped":
                self._say("expert_products grouped: on a CPU in 16 bits all the same in a loop, with the same bits")
        elif self._device.type == "cpu":
            self._settle("expert_products", lambda: fastest_products(config, rows, dtype))
        elif accelerator.kind_of(self._device).has_grouped_products:
            self._settle("expert_products", lambda: ("grouped", "a loop would wait for the GPU"))
        else:
            self._settle("expert_products", lambda: ("loop", f"{self._device.type} may lack PyTorch's kernel"))

    def balance_loss(self, data: TrainingData) -> None:
        """What is usual, unless something else balances the experts, or nothing can.

        Raises:
            InputError: experts' settings are given, and init_from's model has none; or a loss of the routers, and pairs
                of answers are trained on.
        """
        t = self._training
        if not data.config.n_experts:
            if problems := of_no_experts(t):
                raise InputError(*problems)
            self.made["balance_loss"] = 0.0
            return
        for name in ("balance_loss", "router_z_loss"):
            if data.is_pairs and (given := getattr(t, name)) not in (AUTO, 0):
                raise InputError(f"{name}: {given:g} found, but the loss of pairs is no sum over tokens; omit it")
        about = data.config.expert_bias, t.lora_rank > 0, data.is_pairs
        self._settle("balance_loss", lambda: automatic_balance_loss(*about))

    def learning_rate(self, parameters: int, tokens_per_step: int, data: TrainingData) -> float:
        """What suits the size of the model and of a step.

        Args:
            parameters: of the model that compute a token, adapters not counted.
            data: chats tune weights of `init_from`, at a lower rate; pairs at a still lower one.

        Raises:
            InputError: min_lr is above it.
        """
        t, adapters = self._training, self._training.lora_rank > 0
        why = f"{t.optimizer_type}, {parameters:,} parameters, {tokens_per_step:,} tokens per step"
        share = 1.0
        if adapters or (data.is_chat and t.init_from is not None):
            share = (PREFERENCE_SHARE if data.is_pairs else TUNING_SHARE) * (ADAPTERS_TIMES if adapters else 1)
            tuning = f"of the rate of pre-training, to tune on {'pairs' if data.is_pairs else 'chats'}"
            why += f"; {share:g} " + ("times the rate of pre-training, for LoRA's adapters" if adapters else tuning)
        rate = self._settle(
            "learning_rate",
            lambda: (automatic_learning_rate(t.optimizer_type, parameters, tokens_per_step, share), why),
        )
        if t.min_lr is not None and t.min_lr > rate:
            raise InputError(f"min_lr: {t.min_lr} is above learning_rate {rate:g} (auto)")
        return rate

    def warmup_steps(self, total_steps: int) -> int | None:
        """A share of all steps; None: `plan_schedule` decides."""
        return self._settle(
            "warmup_steps", lambda: (automatic_warmup(total_steps), f"of {counted(total_steps, 'step')}")
        )

    def compile(self, seconds: float) -> bool:
        """Whether compiling pays.

        Args:
            seconds: the expected time of the rest of the run, the same on all processes.
        """

        def choose() -> tuple[bool, str]:
            pays, why = compile_pays(self._device.type, seconds, cpp_compiler())
            return self._processes.smallest(pays) > 0, why

        return self._settle("compile", choose)

    def cuda_graph(self, problem: str | None) -> bool:
        """Whether steps are captured. A checkpoint does not keep it: a resumed run, whose processes may be more or
        fewer, chooses again, and computes the same bits either way.

        Args:
            problem: why they can't be, see `step_graph.graph_problem`.

        Raises:
            InputError: it is asked for, and they can't.
        """
        asked = self._training.cuda_graph
        if asked is True and problem is not None:
            raise InputError(f"cuda_graph: true found, but {problem}; use auto or false")
        if asked != AUTO:
            return asked
        if self._device.type in accelerator.GRAPHS:  # where there are none, nobody asks why
            why = problem or "a step is launched at once, not kernel by kernel"
            self._say(f"cuda_graph {value_text(problem is None)} (auto): {why}")
        return problem is None
