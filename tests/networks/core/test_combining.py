"""LoRAs made into one have the effect that their ratios say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from networks.core.combining import combine, dimensions
from networks.core.lora_file import LoraFile, LowRankPair


def lora(name: str, rank: int, alpha: float, rows: int = 6, names: tuple[str, ...] = ("a", "b")) -> LoraFile:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    pairs = {
        layer: LowRankPair(
            torch.randn(rank, 5, generator=generator), torch.randn(rows, rank, generator=generator), alpha
        )
        for layer in names
    }
    return LoraFile(f"{name}.safetensors", pairs, {})


def effect(pair: LowRankPair) -> Tensor:
    return pair.difference(torch.Size((pair.up.shape[0], 5)))


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.3, -0.5, 0.0])
def test_one_file_has_its_effect_times_its_ratio(ratio: float, concat: bool) -> None:
    one = lora("one", 4, 2.0)
    combined = combine([one], [ratio], concat)
    for name, pair in combined.items():
        assert pair.alpha == 2.0
        assert torch.allclose(effect(pair), ratio * effect(one.pairs[name]), atol=1e-6)


def test_ranks_beside_each_other_have_the_exact_sum_of_effects() -> None:
    files = [lora("one", 4, 2.0), lora("two", 6, 1.0), lora("three", 2, 8.0, names=("b",))]
    ratios = [0.8, -0.5, 1.5]
    combined = combine(files, ratios, concat=True)
    assert {name: pair.rank for name, pair in combined.items()} == {"a": 10, "b": 12}
    for name, pair in combined.items():
        exact = sum(r * effect(f.pairs[name]) for f, r in zip(files, ratios, strict=True) if name in f.pairs)
        assert torch.allclose(effect(pair), exact, atol=1e-5)


def test_added_matrices_of_one_lora_twice_are_the_lora_four_times() -> None:
    # Up and down are both added, so one's up meets the other's down as well.
    one = lora("one", 4, 2.0)
    for name, pair in combine([one, one], [1.0, 1.0], concat=False).items():
        assert pair.rank == 4
        assert torch.allclose(effect(pair), 4 * effect(one.pairs[name]), atol=1e-5)


@pytest.mark.parametrize("concat", [False, True])
def test_shuffled_ranks_have_the_same_effect(concat: bool) -> None:
    files = [lora("one", 4, 2.0), lora("two", 4, 1.0)]
    plain = combine(files, [1.0, 0.5], concat)
    shuffled = combine(files, [1.0, 0.5], concat, torch.Generator().manual_seed(3))
    for name in plain:
        assert not torch.equal(plain[name].down, shuffled[name].down)
        assert torch.allclose(effect(plain[name]), effect(shuffled[name]), atol=1e-5)


def test_other_ranks_need_concat() -> None:
    with pytest.raises(ValueError, match=r"a has rank 4 in one\.safetensors and rank 6 in two\.safetensors.*--concat"):
        combine([lora("one", 4, 1.0), lora("two", 6, 1.0)], [1.0, 1.0], concat=False)


def test_layers_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="they are for different models"):
        combine([lora("one", 4, 1.0), lora("two", 4, 1.0, rows=8)], [1.0, 1.0], concat=True)


def test_mixed_ranks_are_called_dynamic() -> None:
    assert dimensions(lora("one", 4, 2.0).pairs) == ("4", "2.0")
    assert dimensions(lora("one", 4, 2.0).pairs | lora("two", 6, 2.0, names=("c",)).pairs) == ("Dynamic", "2.0")
