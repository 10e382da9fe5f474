"""What a single value must be: within its bounds, and a path must lead to what it names."""

import math
import re
from dataclasses import Field
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def wrong_number(declared: Field[Any], value: Any) -> str | None:
    """What is wrong with a number that is out of the flag's bounds."""
    low, high = declared.metadata["at_least"], declared.metadata["at_most"]
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and low is not None and not number >= low:
            return f"must be at least {low}, got {number}"
        if number is not None and high is not None and not number <= high:
            return f"must be at most {high}, got {number}"
        if isinstance(number, float) and not math.isfinite(number):
            return f"must be a number, got {number}"
    return None


def wrong_path(declared: Field[Any], value: Any) -> str | None:
    """What is wrong with a path that leads nowhere, or to the wrong kind of thing."""
    find = {
        "": _anything,
        "file": _file,
        "folder": _folder,
        "weights": _weights,
        "model": _model,
        "thumbnail": _thumbnail,
    }
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None and (wrong := find[declared.metadata["names"]](str(part))):
            return wrong
    return None


def _anything(value: str) -> None:
    return None


def _file(value: str) -> str | None:
    if Path(value).is_dir():
        return f"{value} is a folder, but a file is expected"
    return None if Path(value).is_file() else f"there is no file {value}"


def _folder(value: str) -> str | None:
    if Path(value).is_file():
        return f"{value} is a file, but a folder is expected"
    return None if Path(value).is_dir() else f"there is no folder {value}"


def _weights(value: str) -> str | None:
    return None if Path(value).exists() else f"there is no file or folder {value}"


def _model(value: str) -> str | None:
    if Path(value).exists() or (HUB_ID.fullmatch(value) and not value.lower().endswith(WEIGHTS)):
        return None
    return f"{value} is neither a file, nor a folder, nor a hub id (owner/name)"


def _thumbnail(value: str) -> str | None:
    return None if value.startswith("data:") else _file(value)
