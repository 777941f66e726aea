"""Attention within documents by their starts is that by a mask, in outputs and gradients."""

import pytest
import torch

from model.attention import causal_attention, document_mask
from model.document_attention import document_attention, document_starts, problem_on

CPU = torch.device("cpu")


def random_documents(rows: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, tokens, generator=generator) < 0.15).long().cumsum(1)


def test_starts_are_those_of_documents_and_rows_and_the_end_fills_the_rest():
    numbers = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [5, 6, 6, 9]])
    starts = document_starts(numbers)
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2, 4, 8, 9, 11] + [12] * 11
    one = document_starts(torch.zeros(1, 8, dtype=torch.int64))
    assert one.tolist() == [0, 8, 8]


def test_the_places_of_an_earlier_batch_stay_while_they_suffice():
    many, few = random_documents(4, 64, 0), torch.zeros(4, 64, dtype=torch.int64)
    places = len(document_starts(many)) - 1
    assert len(document_starts(few, places)) == places + 1
    assert document_starts(few, places)[:6].tolist() == [0, 64, 128, 192, 256, 256]
    begins = 4 + int((many[:, 1:] != many[:, :-1]).sum())
    assert begins <= places < 4 * begins and len(document_starts(many, 2)) == places + 1
    assert len(document_starts(many, begins)) == begins + 1  # just enough


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_gradients_are_those_with_a_mask(kv_heads, seed):
    numbers = random_documents(3, 40, seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, heads, 40, 8) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)

    def computed(attention) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    by_starts = computed(lambda *qkv: document_attention(*qkv, document_starts(numbers, 64)))
    by_mask = computed(lambda *qkv: causal_attention(*qkv, mask=document_mask(numbers)))
    for own, right in zip(by_starts, by_mask, strict=True):
        torch.testing.assert_close(own, right)


def test_operators_are_whole_for_compile():
    q, k, v = torch.randn(24, 4, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8)
    starts = document_starts(random_documents(2, 12, 1))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.mateconv.document_attention.default, (*inputs, starts, 12))


def test_a_device_with_other_numbers_or_no_such_kernel_is_told(monkeypatch):
    assert problem_on(CPU, 4, 2, 16) is None
    assert "can" in problem_on(torch.device("meta"), 4, 2, 16).lower()
    from model import document_attention as module

    right = module._by_document

    def of_the_row(q, k, v, starts):  # as if starts were ignored
        return right(q, k, v, starts[[0, -1]]) if q.dtype == torch.bfloat16 else right(q, k, v, starts)

    monkeypatch.setattr(module, "_by_document", of_the_row)
    assert problem_on(CPU, 4, 2, 16).startswith("its outputs are off by ")
