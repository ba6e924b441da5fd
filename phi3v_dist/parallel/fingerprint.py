"""A tensor, whole or in pieces → 16 hexadecimal digits that say whether it is still the same.

Surprise: the pieces' numbers add up to that of the whole, however it is cut, so ranks that each hold a share agree by
one sum. It finds accidents, not forgeries. The formula is in docs/checkpoint-format.md.
"""

import torch
from torch import Tensor

BLOCK = 2**22  # elements widened to int64 at a time


def fingerprint(elements: Tensor, start: int = 0) -> Tensor:
    """The sum of bits x (2 x position + 1) over elements [start, …) of a flattened tensor, int64, modulo 2^64."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[elements.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=elements.device)
    for begin in range(0, elements.numel(), BLOCK):
        bits = elements[begin : begin + BLOCK].view(integers).to(torch.int64)
        first = 2 * (start + begin) + 1
        total += (bits * torch.arange(first, first + 2 * len(bits), 2, device=bits.device)).sum()
    return total


def fingerprint_text(total: Tensor) -> str:
    return f"{int(total) % 2**64:016x}"
