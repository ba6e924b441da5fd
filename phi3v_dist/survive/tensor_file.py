"""Named tensors → one safetensors file, block by block.

In: names with shapes and types, and a way to get each tensor. Out: the file's bytes in order, so that whoever writes
them may hash them too. Surprise: the safetensors library's own writer wants all tensors of a file in memory at once;
the format does not, it only wants to know shapes and types first.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name → shape, type


def size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def blocks(specs: Specs, get: Callable[[str], Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file in order: header length, header, elements."""
    yield header(specs, metadata)
    for name in _order(specs):
        tensor = get(name)
        assert (tuple(tensor.shape), tensor.dtype) == specs[name], (name, tensor.shape, tensor.dtype, specs[name])
        elements = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(elements), BLOCK_BYTES):
            yield elements[begin : begin + BLOCK_BYTES]


def header(specs: Specs, metadata: Mapping[str, str]) -> bytes:
    """What comes before the elements, its own length included."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in _order(specs):
        shape, dtype = specs[name]
        begin, end = end, end + size_bytes(shape, dtype)
        fields[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(specs: Specs) -> list[str]:
    """Wide types first, so that every tensor is aligned."""
    return sorted(specs, key=lambda name: -specs[name][1].itemsize)
