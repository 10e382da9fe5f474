from __future__ import annotations

import torch
from torch import nn

from library.memory.sharding import bytes_at_once, weight_bytes


def model_of(blocks: int, width: int = 8) -> nn.Sequential:
    """Blocks of 256 bytes, and a last layer that is trained."""
    layers = [nn.Linear(width, width, bias=False) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Linear(width, 2, bias=False)).requires_grad_(False)


def test_what_is_frozen_is_divided_and_two_blocks_are_whole_at_once() -> None:
    model = model_of(6)
    blocks = list(model)[:6]
    assert weight_bytes(model) == 6 * 256 + 64
    each = 2 * 256 + 64  # two blocks and what is in none
    assert bytes_at_once(model, blocks, 4, frees_after_forward=True, in_main_memory=False) == 400 + each
    assert bytes_at_once(model, blocks, 4, frees_after_forward=True, in_main_memory=True) == each
    assert bytes_at_once(model, blocks, 4, frees_after_forward=False, in_main_memory=False) == 400 + 1600
    assert bytes_at_once(model, [], 2, frees_after_forward=True, in_main_memory=True) == 1600
    model[6].requires_grad_(True)
    assert weight_bytes(model) == 6 * 256
    model.register_parameter("scale", nn.Parameter(torch.ones(()), requires_grad=False))  # nothing to divide
    assert weight_bytes(model) == 6 * 256
