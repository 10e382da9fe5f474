"""A short name for the weights of a model, so that a cache knows what it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch

from library.files.sources import Source


def weight_id(sources: Mapping[str, Source], counts: Callable[[str], bool] = lambda name: True) -> str:
    """16 hexadecimal digits of a hash of the one-dimensional weights whose names count.

    Every training changes those, and they are small. They are hashed as float16 and under the names of our modules,
    so that a file in float32, its copy in float16 and one of another layout have the same name.
    """
    digest = hashlib.sha256()
    for name in sorted(sources):
        if len(sources[name].shape) == 1 and counts(name):
            digest.update(name.encode())
            digest.update(sources[name].read().to(torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]
