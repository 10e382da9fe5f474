from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.memory.fp8 import Format, Quantizer, Scaling, dequantize, quantize

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("scaling", "shape", "scale_shape"),
    [
        (Scaling.TENSOR, (6, 128), ()),
        (Scaling.CHANNEL, (6, 128), (6, 1)),
        (Scaling.BLOCK, (6, 128), (6, 2, 1)),
        (Scaling.BLOCK, (6, 96), (6, 1)),
        (Scaling.BLOCK, (6, 4, 3, 3), ()),
        (Scaling.CHANNEL, (6, 4, 1, 1), ()),
    ],
)
def test_a_scale_belongs_to_the_tensor_a_row_or_a_block_of_columns(
    scaling: Scaling, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded, scale = quantize(weight, Format(scaling))
    assert scale is not None
    assert (rounded.dtype, rounded.shape, scale.shape) == (E4M3, weight.shape, scale_shape)
    back = dequantize(rounded, scale, torch.float32)
    # Three bits after the leading one: at most a sixteenth of each number, or of the smallest normal one.
    assert ((back - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()


def test_the_largest_number_of_a_share_becomes_the_largest_of_the_format_and_zeros_stay() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 3] = -0.02
    rounded, scale = quantize(weight)
    assert scale is not None
    assert rounded.float()[0, 3] == -448.0 and float(scale[0, 0]) == pytest.approx(0.02 / 448, rel=1e-6)
    assert (rounded.float()[1] == 0).all() and float(scale[1, 0]) == pytest.approx(1e-8, rel=1e-6)


def test_a_weight_of_many_parts_is_rounded_as_one_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 128)
    for scaling in (Scaling.TENSOR, Scaling.CHANNEL, Scaling.BLOCK):
        whole = quantize(weight, Format(scaling))
        monkeypatch.setattr("library.memory.fp8.ROUNDED_AT_ONCE", 5 * 128)
        parts = quantize(weight, Format(scaling))
        monkeypatch.undo()
        assert torch.equal(whole[0].float(), parts[0].float()) and torch.equal(whole[1], parts[1])


class LiveBytes(TorchDispatchMode):
    """Finds the most memory that what is calculated while the mode is on takes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (storage := made.untyped_storage())._cdata not in given:
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("scaling", Scaling)
def test_rounding_takes_little_more_memory_than_what_it_makes(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_at_once, columns = 2, 256
    monkeypatch.setattr("library.memory.fp8.ROUNDED_AT_ONCE", rows_at_once * columns)
    weight = torch.randn(256, columns).bfloat16()
    with LiveBytes() as memory:
        rounded, scale = quantize(weight, Format(scaling))
    # Scales are calculated in float32, in parts that are joined; three copies in float32 are made of a few rows.
    scales = 0 if scale is None else 2 * 4 * scale.numel() + scale.nbytes
    assert rounded.nbytes <= memory.peak <= rounded.nbytes + scales + 3 * 4 * rows_at_once * columns + 64
    assert memory.peak < weight.nbytes


def test_a_scale_has_the_dtype_of_the_weight_and_without_scaling_there_is_none() -> None:
    weight = torch.randn(4, 64).bfloat16()
    assert quantize(weight)[1].dtype == torch.bfloat16  # type: ignore[union-attr]
    rounded, scale = quantize(weight, Format(Scaling.NONE))
    assert scale is None and torch.equal(rounded, weight.to(E4M3))


def test_the_quantizer_takes_matrices_of_the_layers_it_is_told_and_nothing_else() -> None:
    take = Quantizer(Format(), targets=("blocks",), excluded=("norm", "_emb"))
    for name in ("blocks.0.norm.weight", "blocks.0.lin.bias", "time_emb.weight", "img_in.weight"):
        value = torch.randn(4, 64) if name != "blocks.0.lin.bias" else torch.randn(4)
        assert take(name, value) is value
    assert take("blocks.0.lin.weight", torch.randn(4, 64)).dtype == E4M3
    assert list(take.scales) == ["blocks.0.lin"]


def test_a_file_in_float8_is_used_as_it_is_without_scales_and_refused_with_them() -> None:
    stored = torch.randn(4, 64).to(E4M3)
    assert Quantizer(Format(Scaling.NONE))("a.weight", stored) is stored
    bias = torch.randn(4).to(E4M3)
    assert torch.equal(Quantizer(Format(Scaling.NONE))("a.bias", bias), bias.to(torch.bfloat16))
    with pytest.raises(ValueError, match="a.weight is float8_e4m3fn in the file already.*--fp8_base instead"):
        Quantizer(Format())("a.weight", stored)
    for other in (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        with pytest.raises(ValueError, match=f"{str(other)[6:]} in the file; of these formats float8_e4m3fn"):
            Quantizer(Format(Scaling.NONE))("a.weight", torch.randn(4, 64).to(other))


def test_the_layers_that_are_rounded_are_the_recorded_ones(facts: Path) -> None:
    recorded = json.loads((facts / "fp8.json").read_text(encoding="utf-8"))["hunyuan_image_scaled"]
    take = Quantizer(Format(), recorded["target_substrings"], recorded["exclude_substrings"])
    inside = [name for block in ("double", "single") for name in recorded[f"quantized_in_{block}_block_0"]]
    others = ["double_blocks.0.img_attn_q_norm.weight", "img_in.proj.weight", "double_blocks.0.img_mlp.fc1.bias"]
    for name in (*inside, *others):
        value = torch.ones(4, 64) if name.endswith("weight") else torch.ones(4)
        assert (take(name, value).dtype == E4M3) == (name in inside), name
    assert len(take.scales) == len(inside) == 13
