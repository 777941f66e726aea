"""What validation measures: the loss, and the bytes of text that it is spread over."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from model.model import Transformer


@torch.no_grad()
def validation_sums(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    token_bytes: np.ndarray,
    autocast,
    asked_to_stop: Callable[[], bool],
) -> list[float] | None:
    """Loss in nats, tokens and bytes of text, summed over batches; None if a stop was asked for meanwhile.

    Args:
        model: in evaluation mode.
        batches: inputs, targets and numbers of documents or None, int64 [B, T] each; targets below 0 do not count.
        token_bytes: UTF-8 bytes that each id stands for, int [vocab_size].
        autocast: context in which the model runs.
        asked_to_stop: called after each batch, by every process.
    """
    sums = [0.0, 0.0, 0.0]
    for inputs, targets, documents in batches:
        with autocast:
            sums[0] += float(model(inputs, targets, documents=documents))
        counted = targets[targets >= 0].cpu().numpy()
        sums[1] += len(counted)
        sums[2] += int(token_bytes[counted].sum())
        if asked_to_stop():
            return None
    return sums
