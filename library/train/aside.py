"""How previews and validation leave the training as it was: its random numbers and the modes of its modules."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Python's stream and those of torch, CPU and `device`, go on afterwards as if nothing had been drawn."""
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states = [module.get_rng_state() for module in modules]
    python = random.getstate()
    try:
        yield
    finally:
        random.setstate(python)
        for module, state in zip(modules, states):
            module.set_rng_state(state)


@contextmanager
def in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every module in eval mode; each of its parts returns to the mode that it had."""
    before = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, was_training in before.items():
            part.training = was_training
