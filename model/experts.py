"""A mixture of experts (Shazeer et al., 2017): a feed-forward of many, of which a router chooses some for each token.

All experts of a layer are stacked in three tensors. Rows are sorted by expert, multiplied group by group, and brought
back into the tokens' order: however uneven the choice is, no token is dropped.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.accelerator import size_step
from model.feed_forward import FeedForward
from model.LMConfig import LMConfig

BIAS = "feed_forward.router.bias"  # of a layer, in a state dict: a buffer, which no optimizer knows
WAYS = ("loop", "grouped")  # one product for each expert; or PyTorch's kernel for all: on a CPU, the same bits
TINY = 1e-20  # below any sum of scores, but for sigmoids that have all become 0
GROUPED_MULTIPLE = 8  # numbers: the widths that PyTorch's kernel takes are multiples of it


class Router(nn.Module):
    """Scores each expert for each token and chooses those with the highest scores.

    In float32 whatever the products' dtype: rounded scores would choose other experts.

    Attributes:
        weight: [n_experts, dim]
        bias: float32 [n_experts], added to the scores for the choice only (DeepSeek-V3); a buffer, since no gradient
            reaches it (`training/balance.py` moves it). None without expert_bias.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.n_active, self.score = config.n_active_experts, config.expert_score
        self.normalize = config.normalize_expert_weights
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.register_buffer("bias", torch.zeros(config.n_experts) if config.expert_bias else None)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast as `nn.Module` does, but keep the bias in float32: 16 bits would round its small steps away."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """x [N, dim] -> float32 [N, n_experts]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())

    def scores(self, logits: Tensor) -> Tensor:
        """Of each expert for each token, from 0 to 1: float32 [N, n_experts] -> the same."""
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token, int64 [N, n_active], and their weights, float32 [N, n_active]."""
        preferred = scores.detach() if self.bias is None else scores.detach() + self.bias
        chosen = preferred.topk(self.n_active, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=TINY)
        return chosen, weights


class Experts(nn.Module):
    """Many SwiGLUs, w2(silu(w1 x) * w3 x), stacked.

    Attributes:
        w1, w3: [n_experts, expert_hidden_dim, dim]
        w2: [n_experts, dim, expert_hidden_dim]
        way: how the products are computed, one of WAYS.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        wide, narrow = (config.expert_hidden_dim, config.dim), (config.dim, config.expert_hidden_dim)
        self.w1 = nn.Parameter(torch.empty(config.n_experts, *wide))
        self.w2 = nn.Parameter(torch.empty(config.n_experts, *narrow))
        self.w3 = nn.Parameter(torch.empty(config.n_experts, *wide))
        self.way = "loop"

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert [R, dim] -> [R, dim].

        Args:
            ends: int32 [n_experts], where each expert's rows end; those of an expert without rows, where it begins.
        """
        grouped = self.way == "grouped"
        w1, w2, w3 = (weight.to(x.dtype) for weight in (self.w1, self.w2, self.w3))  # which autocast would not cast
        hidden = F.silu(expert_products(x, w1, ends, grouped)) * expert_products(x, w3, ends, grouped)
        return expert_products(hidden, w2, ends, grouped)


class ExpertsFeedForward(nn.Module):
    """The weighted sum of the experts that the router chooses, and of those that all tokens share."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        self.shared = FeedForward(config.dim, config.shared_hidden_dim) if config.n_shared_experts else None
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        rows = x.flatten(0, 1)
        chosen, weights = self.router.choose(self.router.scores(self.router.logits(rows)))
        return self._fed(rows, chosen, weights).view_as(x)

    def with_routing(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and sums over the tokens that count, float32 [n_experts + 2]: the tokens that chose each expert,
        without a gradient; the balance loss; the routers' z-loss, the squared logarithm of the sum of exponentials
        (Zoph et al., 2022).

        The balance loss of a token is 1 where all experts have as many tokens of its sequence, and up to n_experts /
        n_active_experts where some have all. It is DeepSeek's, for each row of the batch by itself, so that it adds up
        over micro-batches and ranks exactly.

        Args:
            x: [B, T, dim]
            counted: bool [B, T], which tokens count.
        """
        rows = x.flatten(0, 1)
        logits = self.router.logits(rows)
        scores = self.router.scores(logits)
        chosen, weights = self.router.choose(scores)
        output = self._fed(rows, chosen, weights).view_as(x)

        is_chosen = torch.zeros_like(scores).scatter_(-1, chosen, 1.0).view(*counted.shape, -1)  # [B, T, E]
        load = (is_chosen * counted[..., None]).sum(1)  # [B, E]
        share = (scores / scores.sum(-1, keepdim=True).clamp(min=TINY)).view(*counted.shape, -1)
        probability = (share * counted[..., None]).sum(1)  # [B, E]
        tokens = counted.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        balance = (load * (scores.shape[-1] / self.router.n_active / tokens) * probability).sum()
        z = (logits.logsumexp(-1) ** 2 * counted.flatten()).sum()
        return output, torch.cat((load.sum(0), torch.stack((balance, z))))

    def _fed(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """rows [N, dim], chosen int64 [N, K], weights float32 [N, K] -> [N, dim]."""
        n_active = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # [N * K]: the rows of expert 0, then those of expert 1, …
        place = order.argsort()  # where each token's rows went
        ends = torch.searchsorted(
            chosen.flatten()[order],
            torch.arange(len(self.router.weight), device=rows.device),
            right=True,
            out_int32=True,
        )
        by_expert = Gathered.apply(rows.to(_products_dtype(rows)), order // n_active, place, n_active)
        fed = Gathered.apply(self.experts(by_expert, ends), place, order, 1)
        output = (fed.unflatten(0, (-1, n_active)) * weights[..., None]).sum(1)
        if self.shared is not None:
            output = output + self.shared(rows)
        return F.dropout(output.to(fed.dtype), self.dropout, self.training)


def _products_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would give to a product of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Gathered(torch.autograd.Function):
    """Rows in another order, some of them several times. Its gradient gathers too: what PyTorch does instead, adding
    rows up where they belong, has another order of summation on each run of a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor, copies: int) -> Tensor:
        """x [N, dim] -> x[rows], [N * copies, dim].

        Args:
            rows: int64 [N * copies], each row of x `copies` times.
            back: int64 [N * copies], where in the result the copies of each row of x are, one row after another.
        """
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The sum over each row's copies."""
        (back,) = ctx.saved_tensors
        grad = grad[back]
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def grouping_problem(config: LMConfig) -> str | None:
    """Why PyTorch's grouped kernel cannot compute experts of this shape; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped kernel"
    dim, hidden_dim = config.dim, config.expert_hidden_dim
    if dim % GROUPED_MULTIPLE or hidden_dim % GROUPED_MULTIPLE:
        multiples = f"multiples of {GROUPED_MULTIPLE}"
        return f"PyTorch's kernel needs {multiples}, dim is {dim} and expert_hidden_dim {hidden_dim}"
    return None


@torch.library.custom_op("mateconv::expert_products", mutates_args=())
def expert_products(x: Tensor, weight: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """The product of each row with its expert's matrix.

    A custom operator, since `torch.compile` then leaves it whole: it compiles neither a loop over numbers of rows that
    only the device knows, nor PyTorch's kernel in float32.

    Args:
        x: float32 or 16 bits [R, columns], sorted by expert.
        weight: of the same dtype [n_experts, rows, columns]
        ends: int32 [n_experts], where each expert's rows end.
        grouped: by PyTorch's kernel; in a loop all the same where a CPU would compile it for every shape.

    Returns:
        of the same dtype [R, rows]
    """
    if grouped and size_step(x) == 1:
        return F.grouped_mm(x, weight.mT, offs=ends)
    out, rows = x.new_empty(len(x), weight.shape[1]), len(x)
    for expert, begin, end in _groups(ends):
        count = _computed(end - begin, x)
        if begin + count <= rows:  # what is too much, the next experts overwrite
            torch.mm(x[begin : begin + count], weight[expert].t(), out=out[begin : begin + count])
        else:
            first = max(0, rows - count)
            out[begin:end] = torch.mm(x[first:], weight[expert].t())[begin - first : end - first]
    return out


@torch.library.custom_op("mateconv::expert_outer_products", mutates_args=())
def expert_outer_products(a: Tensor, b: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """The sum of the outer products of each expert's rows, which is the gradient of its matrix; 0 where it has none.

    Args:
        a, b: of one dtype, [R, rows] and [R, columns], sorted by expert.
        ends, grouped: as of `expert_products`.

    Returns:
        [n_experts, rows, columns]
    """
    if grouped and size_step(a) == 1:
        return F.grouped_mm(a.t(), b, offs=ends)
    out = a.new_zeros(len(ends), a.shape[1], b.shape[1])
    for expert, begin, end in _groups(ends):
        more = _computed(end - begin, a) - (end - begin)
        of_a, of_b = (F.pad(t[begin:end], (0, 0, 0, more)) if more else t[begin:end] for t in (a, b))
        torch.mm(of_a.t(), of_b, out=out[expert])
    return out


def _computed(count: int, x: Tensor) -> int:
    """How many rows a product of `count` rows of `x` computes: where a CPU compiles for every shape, see `size_step`,
    one of 128 numbers at most."""
    if (step := size_step(x)) == 1:
        return count
    step = max(step, 2 ** (len(x).bit_length() - 7))
    return -(-count // step) * step


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end of each group that has rows."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, begin, end
        begin = end


@expert_products.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@expert_outer_products.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    return a.new_empty(len(ends), a.shape[1], b.shape[1])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.grouped = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    (x, weight, ends), grad = ctx.saved_tensors, grad.contiguous()
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    return (
        expert_products(grad, weight.mT, ends, ctx.grouped) if needs_x else None,
        expert_outer_products(grad, x, ends, ctx.grouped) if needs_weight else None,
        None,
        None,
    )


expert_products.register_autograd(_backward, setup_context=_save)
