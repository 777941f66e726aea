"""What validation measures: the loss, and the bytes of text that it is spread over."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model.loss import bits_per_byte, cross_entropy
from model.model import Transformer
from model.text.token_bytes import TokenBytes


@torch.no_grad()
def validation_sums(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    token_bytes: TokenBytes,
    autocast,
    asked_to_stop: Callable[[], bool],
) -> list[float] | None:
    """Sums over batches: loss in nats, tokens, the loss of those that are text, and its bytes; None after a stop.

    Control tokens count in the loss of all tokens only: so a text has the bits per byte that `--score_file` says.

    Args:
        model: evaluated without dropout; returned to the mode that it was in.
        batches: inputs, targets and numbers of documents or None, int64 [B, T] each; targets below 0 do not count.
        token_bytes: bytes of text that ids stand for.
        autocast: context in which the model runs.
        asked_to_stop: called after each batch, by every process.
    """
    sums, is_text = [0.0] * 4, torch.from_numpy(token_bytes.is_text)
    was_training, stopped = model.training, False
    model.eval()
    for inputs, targets, documents in batches:
        counted = targets >= 0
        before, ids = inputs[counted].cpu(), targets[counted].cpu()
        control = torch.zeros_like(counted)
        control[counted] = ~is_text[ids].to(control.device)
        with autocast:
            hidden = model.hidden_states(inputs, documents=documents)
            nats = float(cross_entropy(hidden, model.output.weight, targets))
            silent = float(cross_entropy(hidden[control][None], model.output.weight, targets[control][None]))
        for place, value in enumerate((nats, len(ids), nats - silent, token_bytes.count(before.numpy(), ids.numpy()))):
            sums[place] += value
        if stopped := asked_to_stop():
            break
    model.train(was_training)
    return None if stopped else sums


def mean_losses(sums: list[float]) -> tuple[float, float]:
    """Nats per token and bits per byte of text, from the sums of `validation_sums`."""
    nats, tokens, text_nats, byte_count = sums
    return nats / tokens, bits_per_byte(text_nats, byte_count)
