"""The cases of FLUX.1 and Chroma again, with weights that stream and with blocks that are recomputed.

Outputs are those recorded, and bit for bit those without streaming and recomputing; so are gradients.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.memory.block_swap import spread_evenly
from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.frozen_layers import attach_frozen_layers
from library.memory.host_layers import attach_host_layers
from library.models.flux.model import StreamTransformer
from library.models.flux.stream import Modulation
from tests.library.memory.toys import LateCopier, ParkingSwap
from tests.parity import recipe
from tests.parity.test_parity import HERE, compare, slice_of

CASES = ("flux_dev", "flux_schnell", "flux_diffusers_layout", "flux_controlnet", "chroma")
Prepare = Callable[[StreamTransformer], None]


def blocks(model: StreamTransformer) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def early_weight(model: StreamTransformer) -> nn.Parameter:
    """Of the first block, not streamed since it is small."""
    return model.get_parameter("double_blocks.0.img_attn.norm.query_norm.scale")


def plain(model: StreamTransformer) -> None:
    attach_frozen_layers(model, wanted=lambda layer: True)


def streaming(recompute: Recompute | None = None, kept: int = 0) -> Prepare:
    def prepare(model: StreamTransformer) -> None:
        plain(model)
        all_blocks = blocks(model)
        ParkingSwap(all_blocks, spread_evenly(len(all_blocks), len(all_blocks) - kept), LateCopier())
        if recompute is not None:
            checkpoint_blocks(all_blocks, recompute)

    return prepare


def hosted(model: StreamTransformer) -> None:
    """With all blocks streamed but the layers that make modulations, which are calculated where they lie."""
    plain(model)
    layers = [part.lin for block in blocks(model) for part in block.children() if isinstance(part, Modulation)]
    attach_host_layers(layers, torch.device("cpu"), torch.float32)
    ParkingSwap(blocks(model), range(len(blocks(model))), LateCopier())
    checkpoint_blocks(blocks(model), Recompute.ALL)


def recomputing(recompute: Recompute) -> Prepare:
    def prepare(model: StreamTransformer) -> None:
        plain(model)
        checkpoint_blocks(blocks(model), recompute)

    return prepare


def outputs(
    case: dict[str, object], prepare: Prepare, monkeypatch: pytest.MonkeyPatch, graph: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every output of the case, and with `graph` the gradient of one early weight."""
    adapter = importlib.import_module("tests.parity.adapters.flux")
    models = []

    def load(*words: object) -> StreamTransformer:
        model = original(*words)
        prepare(model)
        early_weight(model).requires_grad_(graph)
        models.append(model)
        return model

    original = adapter.load
    with monkeypatch.context() as patched, torch.set_grad_enabled(graph):
        patched.setattr(adapter, "load", load)
        found = adapter.run(case, recipe)
    (model,) = models
    if not graph:
        return found, None
    sum(value.square().sum() for value in found.values() if value.requires_grad).backward()
    return {name: value.detach() for name, value in found.items()}, early_weight(model).grad


@pytest.mark.parametrize("name", CASES)
def test_streamed_and_recomputed_models_answer_as_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HERE / "cases" / name
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    expected, gradient = outputs(case, plain, monkeypatch, graph=True)
    assert gradient is not None and gradient.abs().sum() > 0
    modes = [hosted, streaming(), streaming(kept=2), *(recomputing(recompute) for recompute in Recompute)]
    modes += [streaming(recompute) for recompute in Recompute]
    for prepare in modes:
        found, its_gradient = outputs(case, prepare, monkeypatch, graph=True)
        assert its_gradient is not None and torch.equal(its_gradient, gradient)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    inferred, _ = outputs(case, streaming(kept=1), monkeypatch, graph=False)
    slices = case.get("slices", {})
    sliced = {key: value[slice_of(slices[key])] if key in slices else value for key, value in inferred.items()}
    tolerance = {bound: case["tolerance"][bound] for bound in ("atol", "rtol")}
    assert not compare(sliced, load_file(Path(folder) / "expected.safetensors"), **tolerance)
