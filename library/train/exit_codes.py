"""What a run's exit code says, and which error leads to which code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TypeVar

import torch

T = TypeVar("T")

NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Parts of what torch says in a plain RuntimeError when memory has run out."""


class ExitCode(IntEnum):
    """The exit codes of a training, and of the tools that prepare one."""

    DONE = 0
    FAILED = 1
    """Files, the device, the network, or a mistake of the program's."""
    SETTINGS = 2
    """The settings, by themselves or on this machine; nothing was loaded."""
    DATA = 3
    """Dataset file, images, captions or caches."""
    MEMORY = 4
    NOT_FINITE = 5
    """Losses or weights are not numbers any more."""
    INTERRUPTED = 130
    """SIGINT or SIGTERM."""


class RunError(ValueError):
    """What ends a run, with the exit code that tells which kind it is."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def marked(code: ExitCode) -> Iterator[None]:
    """While the context lasts mistakes of the user's lead to `code`, unless they are marked already."""
    try:
        yield
    except RunError:
        raise
    except (ValueError, OSError) as error:
        raise RunError(str(error), code) from error


def from_data(values: Iterable[T]) -> Iterator[T]:
    """`values`; a mistake of the user's in the making of one is a mistake in the data."""
    with marked(ExitCode.DATA):
        yield from values


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the machine has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in NO_MEMORY)
