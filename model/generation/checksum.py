"""A checksum of a model's weights, which shows that they changed."""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTH = 1021  # 64-bit words that are summed side by side; a prime, so that no row of a matrix repeats in it
GROUP, BLOCK = 8, 64  # rows of WIDTH that are summed at once, and such groups: many small sums keep all threads at work
FACTOR = 6364136223846793005  # odd, of Knuth's MMIX generator


@torch.no_grad()
def checksum(model: torch.nn.Module) -> bytes:
    """A hash of all weights that depends on their order. It takes about as long as reading them once."""
    sums, rests = [], []
    saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # the biases of routers are buffers
    for tensor in saved.values():
        data = tensor.contiguous().view(-1).view(torch.uint8)
        whole = len(data) // (8 * WIDTH) * (8 * WIDTH)
        rests.append(data[whole:])
        sums += _block_sums(_words(data[:whole]))
    rest = torch.cat(rests)
    rest = torch.cat((rest, rest.new_zeros(-len(rest) % (8 * WIDTH))))
    sums = torch.cat([*sums, *_block_sums(_words(rest))])
    factors = torch.tensor([_signed(pow(FACTOR, n, 2**64)) for n in range(len(sums))], device=sums.device)
    return (sums * factors[:, None]).sum(0).cpu().numpy().tobytes()  # modulo 2**64


def _words(data: Tensor) -> Tensor:
    """Bytes -> int64 [rows, WIDTH]"""
    aligned = data.clone() if data.storage_offset() % 8 else data
    return aligned.view(torch.int64).view(-1, WIDTH)


def _block_sums(rows: Tensor) -> Iterator[Tensor]:
    """The sums of blocks of rows, int64 [1, WIDTH] each."""
    whole = len(rows) // GROUP * GROUP
    if whole:
        for block in rows[:whole].view(-1, GROUP, WIDTH).sum(1).split(BLOCK):
            yield block.sum(0, keepdim=True)
    if whole < len(rows):
        yield rows[whole:].sum(0, keepdim=True)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return number - 2**64 if number >= 2**63 else number
