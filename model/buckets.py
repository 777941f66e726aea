"""The order in which several processes add their gradients up, which decides the last bit."""

import torch
from torch.nn.parallel import DistributedDataParallel

import utils


def settle_buckets(model: DistributedDataParallel, rows: int, seq_len: int, device: torch.device, autocast) -> None:
    """Let DistributedDataParallel order its buckets of gradients now, which it does after its first step.

    Where three or more processes add a gradient up, its place in a bucket decides in which order, and so the last
    bit (the sum of two numbers has but one order). Without this a resumed run would differ in it.

    Args:
        model: its parameters have gradients afterwards, which are to be cleared.
        rows, seq_len: of a batch.
        autocast: context in which the model runs.
    """
    state = utils.random_state()
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
    with autocast:
        loss = model(tokens, tokens)
    loss.backward()
    utils.restore_random_state(state)
