"""The kernels of a GPU for fake tensors, where no GPU need be: what they keep for the backward pass can be counted."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import model.loss  # noqa: F401 (registers the operator)
from model import accelerator
from model.training.plan import Hardware

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention


def absent_gpu(dtype: torch.dtype) -> Hardware:
    """What counts the memory of training on a GPU. A torch that was built without CUDA does not even name its tensors:
    there a CPU's kernels are counted, which keep up to a fifth more for the backward pass (see `counts_kernels`);
    but for the loss, of which a CPU keeps no logits.

    Args:
        dtype: of the matrix products.
    """
    device = torch.device(accelerator.type_with_countable_kernels())
    return Hardware(device, dtype, AbsentGPU(device.type, dtype))


def counts_kernels() -> bool:
    """Whether it is a GPU's own kernels that are counted."""
    return accelerator.type_with_countable_kernels() != "cpu"


class AbsentGPU(TorchFunctionMode):
    """A context in which fake tensors go through autocast, fused attention and loss as a GPU's would.

    Without a GPU, `torch.autocast` disables itself, and PyTorch would choose the attention that keeps all T x T scores.

    Args:
        device_type: of the fake tensors.
        dtype: of the matrix products.
    """

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._device_type = device_type
        self._autocast = torch.autocast(device_type, dtype, enabled=False)
        self._autocast._enabled = dtype != torch.float32  # a private name

    def __enter__(self):
        self._autocast.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._autocast.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and accelerator.kind_of(self._device_type).has_flash_kernels:
            return _attention(*args, **kwargs)
        if function is torch.ops.mateconv.chunked_cross_entropy.default:
            hidden, weight, targets, _ = args
            return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"),)
        return function(*args, **(kwargs or {}))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """What PyTorch chooses with deterministic kernels: flash attention, but for masks and float32, which it lacks."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast's part
    if attn_mask is None and v.dtype != torch.float32:
        return flash_attention(q, k, v, dropout_p, is_causal)[0]
    bias = None
    if attn_mask is not None:  # as numbers, once for all heads
        bias = torch.zeros_like(attn_mask, dtype=v.dtype).expand(-1, q.shape[1], -1, -1)
    return efficient_attention(q, k, v, bias, True, dropout_p, is_causal)[0]
