"""What makes a run's bits repeat: seeds, the states of random generators, and kernels that give the same bits.

torch and numpy are imported where they are used, so that the scripts, which import this, start without them.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from model import accelerator

if TYPE_CHECKING:
    from model.training.choices import Ranks


@contextlib.contextmanager
def deterministic_kernels(device, wanted: bool = True) -> Iterator[None]:
    """On a CUDA GPU, use kernels that give the same bits each time. By default, gradients of attention and, when
    compiled, of the embedding are summed in whatever order threads arrive, and cuBLAS may choose another algorithm.
    Other accelerators keep their kernels: which of them give the same bits is not known here.

    CUBLAS_WORKSPACE_CONFIG must be set before this process's first matrix product there, see `utils.choose_hardware`.

    Args:
        device: a torch.device.
        wanted: False: leave everything as it is.
    """
    import torch

    if not accelerator.kind_of(device).has_deterministic_kernels or not wanted:
        yield
        return
    options = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False  # it only helps to find bugs
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fills


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (torch's on every device)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The state of every global generator, in plain values that `torch.load(weights_only=True)` accepts."""
    import numpy as np
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    } | accelerator.random_states()


def restore_random_state(state: dict) -> None:
    """Restore every global generator to what `random_state` returned."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    accelerator.restore_random_states(state)


def restore_random_states(states: list[dict], ranks: "Ranks", seed: int, say: Callable[[str], None]) -> None:
    """Restore this rank's generators; where a checkpoint was written by another number of ranks, seed them instead.

    Args:
        states: `random_state` of each rank that wrote the checkpoint.
        ranks: those of this run.
        seed: for this rank, where the states are those of another number of ranks.
        say: prints one line for the user.
    """
    if len(states) == ranks.world_size:
        restore_random_state(states[ranks.rank])
        return
    say(
        f"the checkpoint was written by {len(states)} processes, now there are {ranks.world_size}:"
        " the order of samples stays the same, dropout is reseeded"
    )
    seed_everything(seed)
