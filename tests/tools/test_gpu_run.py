from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu_run import FULL_SIZE, SCALINGS, Variant, run
from library.memory.checkpointing import Recompute

SMALL = replace(
    FULL_SIZE, width=64, num_heads=2, mlp_width=128, text_dim=32, double_blocks=4, single_blocks=8, pooled_dim=16
)


def losses(form: str, swap: int, recompute: Recompute, device: str = "cpu", steps: int = 1) -> tuple[float, ...]:
    variant = Variant(form, swap, recompute, compiled=False)
    return run(SMALL, variant, torch.device(device), size=(4, 4), text=8, steps=steps).losses


@pytest.mark.parametrize("form", SCALINGS)
def test_the_measured_steps_are_the_same_with_and_without_swapped_blocks(form: str) -> None:
    expected = losses(form, 0, Recompute.ALL)
    assert len(expected) == 4 and len(set(expected)) > 1
    assert losses(form, 3, Recompute.ELEMENTWISE) == expected


def test_a_variant_says_what_it_is() -> None:
    variant = Variant("fp8_scaled", 18, Recompute.ALL, compiled=True)
    assert str(variant) == "fp8_scaled, 18 blocks swapped, recompute all, compiled"


@pytest.mark.gpu
@pytest.mark.slow
def test_500_steps_on_a_gpu_with_streaming_weights_are_those_without() -> None:
    expected = losses("bf16", 0, Recompute.ALL, "cuda", steps=497)
    assert losses("bf16", 5, Recompute.ALL, "cuda", steps=497) == expected
