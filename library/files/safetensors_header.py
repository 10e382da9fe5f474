"""How a safetensors file begins: which tensors lie where, in the order that the format's own writer gives them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

# The order in which safetensors lays tensors out: wide types first, so that each is aligned; then by name.
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order their values lie in the file."""
    order = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
    return sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Everything before the first value: 8 bytes of length, then JSON padded to a multiple of 8.

    Only shapes and dtypes of `tensors` are looked at, so they may lie on the meta device.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}  # written even when it is empty
    offset = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
