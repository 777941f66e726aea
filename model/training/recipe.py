"""The recipe behind the word `auto`: settings as functions of the model's size, the tokens and the machine.

Pure functions, without torch; choices.py beside it asks them, and says what they answered. Rates were measured on a
small model and Chinese text (benchmarks/RESULTS.md); the other numbers are choices, and where they come from is said
there.
"""

import importlib
import math
import os
import shutil
import sys

from model.accelerator import kind_of
from model.errors import InputError, counted
from model.training.optimizer import OPTIMIZERS

# What `recipe` sets where nothing else does, by name: each setting's value, and why. Measured: benchmarks/RESULTS.md,
# "What a recipe learns"; what was tried and left out stands there too.
RECIPES: dict[str, dict[str, tuple[object, str]]] = {
    "best": {
        "optimizer_type": ("muon", "the loss of a tuned AdamW with a third of its tokens"),
        "lr_scheduler": ("linear", "learns more than a cosine"),
        "learning_rate": ("auto", "to suit model and batch"),
        "warmup_steps": ("auto", "a twentieth of the steps"),
        "batch_size": ("auto", "small steps while tokens are few"),
        "epochs": ("auto", "repeated text teaches less each time"),
        "document_mask": (True, "the start of a text is learned without another one before it"),
        "qk_norm": (True, "attention that cannot grow too sharp takes higher rates"),
    }
}

BASE_PARAMETERS = 3e6  # the model's parameters, and
BASE_TOKENS = 2048  # the tokens of a step, for which the optimizers' base rates are best
MOST_SCALING = 4.0  # of the rate for larger or smaller steps, either way

STEPS_OF_A_RUN = 600  # at least: more tokens make larger steps
LEAST_TOKENS, MOST_TOKENS = 2048, 2**19  # of a step
# A run of fewer steps of LEAST_TOKENS takes twice as many of half of them: 2.9 million parameters end at 5.65, not 5.74
# nats a token after 0.1 million tokens, and at 5.35, not 5.39 after 0.2 million; after 0.6 million it is the same.
FEWEST_STEPS = 200

# Passes of `auto` (least, most), and the steps of LEAST_TOKENS that they should come to. Of texts up to four passes are
# nearly as good as new texts (Muennighoff et al., 2023); of few chats many are needed (benchmarks/RESULTS.md).
# With more than BY_HEART parameters for each of its tokens, a text is learned by heart in over MOST_BY_HEART passes:
# 2.9 million parameters end at 2.75, 2.67 and 2.89 bits per byte after 1, 2 and 4 passes over 0.15 million tokens, and
# at 2.61, 2.50 and 2.54 over 0.3 million.
EPOCHS = {"texts": ((1, 4), STEPS_OF_A_RUN), "chats": ((3, 60), 200), "pairs": ((1, 1), 1)}
BY_HEART, MOST_BY_HEART = 5, 2

LEAST_WARMUP, MOST_WARMUP = 10, 1000  # steps
WARMUP_SHARE = 0.05  # of all steps

# Seconds of training; compiling takes 30 to 60 of them. It gains a tenth on a CPU (benchmarks/RESULTS.md), and more on
# a GPU, as others report.
COMPILE_PAYS_AFTER_ON_CPU, COMPILE_PAYS_AFTER = 900.0, 180.0
TUNING_SHARE = 0.3  # of the rate of pre-training, for weights that learn to answer
ADAPTERS_TIMES = 10.0  # the rate of tuning, for LoRA's adapters (Schulman et al., 2025: "LoRA Without Regret")
# And for a model that answers and learns which answers are preferred. Of 2.9 million parameters, over one epoch of
# 2,095 pairs, 0.003, 0.01, 0.03 and 0.1 put 68, 76, 79 and 82 % of held-out chosen answers above the rejected ones, and
# left 95, 95, 89 and 56 % of answers that stop by themselves.
PREFERENCE_SHARE = 0.01
BALANCE_LOSS = 0.01  # of experts, in the middle of what is usual (0.001 to 0.1)
MUCH_TO_WRITE = 10**9  # bytes of a checkpoint: half a second and more of a disk, so several writers pay
MUCH_STATE = 0.1  # of the free memory: above it, ranks share the state of an optimizer whose work is small
USUAL_SHARE = 0.4  # of the matrix products' peak that training reaches, until it is measured


def automatic_learning_rate(optimizer_type: str, parameters: int, tokens_per_step: int, share: float = 1.0) -> float:
    """The highest learning rate: the rate that was best for a small model, by optimizer, scaled to this model.

    It grows with the square root of the tokens per step, as gradients get less noisy (Malladi et al., 2022), by a
    factor of 4 at most either way, and falls with the square root of the model's size. Only the small model was
    measured (benchmarks/RESULTS.md); at the size of GPT-2 it comes near to what nanoGPT and modded-nanogpt use.

    Args:
        optimizer_type: as in the settings.
        parameters: of the model, tied ones once.
        tokens_per_step: over all micro-batches and processes.
        share: of that rate that is taken, as TUNING_SHARE.

    Raises:
        InputError: no such rate is known for the optimizer.
    """
    by_batch = math.sqrt(tokens_per_step / BASE_TOKENS)
    by_size = math.sqrt(BASE_PARAMETERS / parameters)
    base_rate = OPTIMIZERS[optimizer_type].base_rate
    if base_rate is None:
        raise InputError(f"learning_rate: auto found, but {optimizer_type} has no automatic rate; give a number")
    rate = base_rate * min(MOST_SCALING, max(1 / MOST_SCALING, by_batch)) * by_size
    rate *= share
    return float(f"{rate:.2g}")  # two digits: more of them make no difference


def automatic_warmup(total_steps: int) -> int:
    """Steps of the warm-up: 5 % of all, within 10 and 1,000, at most a quarter of a short run."""
    wanted = min(MOST_WARMUP, max(LEAST_WARMUP, round(WARMUP_SHARE * total_steps)))
    return min(wanted, total_steps // 4)


def automatic_epochs(kind: str, epoch_tokens: int, parameters: int) -> tuple[int, str]:
    """The passes over the training data, and why.

    Args:
        kind: of the data, a key of EPOCHS.
        epoch_tokens: the training data's.
        parameters: of the model that compute a token.
    """
    (least, most), steps = EPOCHS[kind]
    wanted = math.ceil(steps * LEAST_TOKENS / epoch_tokens)
    why = f"{least} to {most} over {kind}, more the fewer they are" if least < most else f"{kind} are read once"
    epochs = max(least, min(most, wanted))
    if kind == "texts" and learns_by_heart(parameters, epoch_tokens, epochs):
        return (
            MOST_BY_HEART,
            f"in more, {parameters:,} parameters would learn {count_text(epoch_tokens)} tokens by heart",
        )
    return epochs, why


def learns_by_heart(parameters: int, epoch_tokens: int, epochs: float) -> bool:
    """Whether so many passes over a text from random weights teach the text itself rather than its language."""
    return round(epochs) > MOST_BY_HEART and parameters > BY_HEART * epoch_tokens


def automatic_tokens_per_step(epoch_tokens: int, epochs: int, max_steps: int | None) -> tuple[int, str]:
    """The tokens that one step should read: a power of two, so that the run has about 600 steps; and why.

    Fewer and larger steps learn less from as many tokens; more and smaller ones use the hardware badly. The best size
    grows with the run (McCandlish et al., 2018). With `max_steps` the run's tokens follow from the batch and can't
    decide its size: one epoch's tokens do, and a long run spreads its steps over one epoch. The least is LEAST_TOKENS,
    or half of them where a run without `max_steps` would have fewer than FEWEST_STEPS.

    Args:
        epoch_tokens: the training data's.
    """
    least = LEAST_TOKENS
    if max_steps is None:
        tokens, why = epochs * epoch_tokens, f"for a run of {count_text(epochs * epoch_tokens)} tokens"
        wanted = tokens / STEPS_OF_A_RUN
        least = LEAST_TOKENS if tokens >= FEWEST_STEPS * LEAST_TOKENS else LEAST_TOKENS // 2
    else:
        wanted = epoch_tokens / max(max_steps, STEPS_OF_A_RUN)
        why = f"for {counted(max_steps, 'step')} and an epoch of {count_text(epoch_tokens)} tokens"
    power = 2 ** round(math.log2(max(1, wanted)))
    return min(MOST_TOKENS, max(least, power)), why


def automatic_batch_size(tokens_per_step: int, tokens_per_row: int, samples: int, fits: int | None) -> int:
    """Samples that a process reads at once: the step's share, within the samples and the memory that there are.

    Args:
        tokens_per_step: wanted.
        tokens_per_row: of one sample, times accumulation_steps and processes: what batch_size is multiplied by.
        samples: of the training data, divided by the same; a larger batch would be padding.
        fits: samples that fit the memory; None: any number does.
    """
    wanted = max(1, min(tokens_per_step // tokens_per_row, samples))
    return wanted if fits is None else max(1, min(wanted, fits))


def run_seconds(flops: float, peak_flops: float) -> float:
    """Roughly how long a run takes, before any of its steps was measured; evaluations are not counted.

    Args:
        flops: of the whole run.
        peak_flops: FLOP/s of large matrix products, of all processes together.
    """
    return flops / (USUAL_SHARE * peak_flops)


def compile_pays(
    device_type: str, seconds: float, compiler: str | None, platform: str = sys.platform
) -> tuple[bool, str]:
    """Whether `torch.compile` saves more time than it takes, and why.

    Args:
        device_type: as torch names it.
        seconds: that the run is expected to take without it (`run_seconds`).
        compiler: what `cpp_compiler` found.
        platform: as `sys.platform` names it.
    """
    if not kind_of(device_type).compiles:
        return False, f"not on {device_type}, where torch.compile is not yet complete"
    if device_type == "cpu" and platform != "linux":
        return False, "on a CPU it was tested on Linux only"
    if compiler is None:
        return False, "torch.compile needs a C++ compiler, and none was found"
    # Said is on which side of the limit a run is, and no time: the dry run and the bar tell the measured one.
    pays_after = COMPILE_PAYS_AFTER_ON_CPU if device_type == "cpu" else COMPILE_PAYS_AFTER
    limit = duration_text(pays_after)
    if seconds < pays_after:
        return False, f"by its FLOPs, training takes under {limit}, too short to win back the time of compiling"
    return True, f"by its FLOPs, training takes over {limit}, and compiling up to a minute"


def automatic_shard(optimizer_type: str, state: int, free: int, ranks: int) -> tuple[str, str]:
    """Whether ranks share the optimizer, and why.

    Args:
        state: bytes of the optimizer's state and the moving average.
        free: bytes that a rank may take.
        ranks: two at least.
    """
    if optimizer_type == "muon":
        return "optimizer", f"each of {ranks} ranks does its share of Muon's matrix products"
    if state > MUCH_STATE * free:
        return "optimizer", f"the optimizer's state takes {state / free:.0%} of the free memory, a share of it less"
    return "none", f"the optimizer's state takes {state / free:.0%} of the free memory, and sharing it takes time"


def automatic_balance_loss(has_bias: bool, is_frozen: bool, is_pairs: bool) -> tuple[float, str]:
    """What the loss that balances experts counts, and why.

    Args:
        has_bias: whether a bias balances them.
        is_frozen: whether the routers are.
        is_pairs: whether pairs of answers are trained on, whose loss is no sum over tokens.
    """
    for is_so, why in (
        (is_pairs, "with pairs of answers there is none"),
        (is_frozen, "the routers are frozen"),
        (has_bias, "the bias balances the experts"),
    ):
        if is_so:
            return 0.0, why
    return BALANCE_LOSS, "spreads each sequence's tokens over the experts"


def all_should_write(is_shared: bool, several_machines: bool, checkpoint_bytes: int) -> bool:
    """Whether all ranks should write a checkpoint, each its part.

    Args:
        is_shared: whether the ranks share the optimizer, or more: one writer would have to gather it first.
        several_machines: whether they may have separate disks.
    """
    return is_shared and not several_machines and checkpoint_bytes >= MUCH_TO_WRITE


def cpp_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would call, or None; searched as torch does."""
    try:
        find = importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler
    except (ImportError, AttributeError):  # a private name, which may move
        name = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
        return next((found for word in (name, "clang++") if (found := shutil.which(word))), None)
    try:
        return find()
    except Exception:  # torch's own exception types, which differ between versions and systems
        return None


def batch_text(rows: int, accumulated: int, processes: int) -> str:
    """Where a step's samples come from: "16 x 2 accumulated x 4 processes"."""
    parts = [str(rows)]
    if accumulated > 1:
        parts.append(f"{accumulated} accumulated")
    if processes > 1:
        parts.append(f"{processes} processes")
    return " x ".join(parts)


def value_text(value) -> str:
    """A setting's value as users write it: "true", "0.005", "muon"."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def count_text(number: float) -> str:
    """A large number in short: "2.0M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration_text(seconds: float) -> str:
    """A measured time in short: "1 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def rough_duration_text(seconds: float) -> str:
    """An estimate, rounded to what can be known of it: "under 10 s", "about 40 s", "about 1.5 h", "about 100 days"."""
    if seconds < 10:
        return "under 10 s"
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86400, math.inf)):
        if seconds < limit * size:
            count = seconds / size
            magnitude = 10 ** math.floor(math.log10(count))
            digits = 1 if count / magnitude > 2 else 2  # 1.5 h, 14 min, but 40 s
            return f"about {round(count / magnitude, digits - 1) * magnitude:.3g} {unit}"
    raise AssertionError("not reached")
