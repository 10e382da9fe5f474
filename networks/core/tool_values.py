"""Words on a tool's command line that name number formats and devices, and the file that is to be written."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from library.files.weights import SAFETENSORS_SUFFIXES

DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
STORED_ONLY = {"fp8": torch.float8_e4m3fn, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Formats that weights can be kept in, and that nothing is computed in."""


def dtype_of(word: str, flag: str, stored: bool = False) -> torch.dtype:
    """The format that `flag` names; with `stored`, those of `STORED_ONLY` too.

    Raises:
        ValueError: there is none of that name.
    """
    known = DTYPES | STORED_ONLY if stored else DTYPES
    if word not in known:
        raise ValueError(f"--{flag} {word}: expected one of {', '.join(known)}")
    return known[word]


def device_of(word: str | None, flag: str) -> torch.device:
    """The device that `flag` names, the CPU for None.

    Raises:
        ValueError: there is none of that name, or this machine has none.
    """
    try:
        device = torch.device(word or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--{flag} {word}: this machine has no such device ({reason})") from error
    return device


def safetensors_target(path: str | os.PathLike[str] | None, flag: str) -> Path:
    """The file that `flag` says to write; its folder is made.

    Raises:
        ValueError: it is missing, or is not a .safetensors file.
    """
    if not path:
        raise ValueError(f"--{flag} is missing: name the .safetensors file to write")
    target = Path(path)
    if target.suffix.lower() not in SAFETENSORS_SUFFIXES:
        raise ValueError(f"--{flag} {target}: expected a name that ends in .safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
