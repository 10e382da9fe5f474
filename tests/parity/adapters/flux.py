"""Runs the cases of the FLUX.1 and Chroma transformers: writes the checkpoint, loads it as a user's file, answers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import save_safetensors
from library.models.flux.checkpoint import load_controlnet, load_transformer
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.model import FluxTransformer, StreamTransformer, conditioning, sinusoids


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    inputs = case["inputs"]
    given = {
        name: recipe.tensor(name, entry["shape"], case["seed"])
        for name, entry in inputs.items()
        if entry["kind"] == "tensor"
    } | {name: entry["value"] for name, entry in inputs.items() if entry["kind"] == "value"}
    with tempfile.TemporaryDirectory() as folder:
        model = load(Path(folder), case, recipe)
        if "controlnet_checkpoint" in case:
            return controlled(Path(folder), model, case, recipe, given)
    img, txt, t = given["img"], given["txt"], torch.tensor(given["timesteps"])
    guidance = None if given["guidance"] is None else torch.tensor(given["guidance"])
    size = tuple(given["packed_hw"])
    if isinstance(model, ChromaTransformer):
        return chroma(model, img, txt, t, guidance, size, given["txt_lengths"])
    pooled = given["y"]
    outputs = {
        "out_nomask": model(img, txt, t, guidance, pooled, size),
        "out_mask": model(img, txt, t, guidance, pooled, size, given["txt_lengths"]),
    }
    if "vec" in case["outputs"]:
        assert isinstance(model, FluxTransformer)
        parts = (model.time_in, model.guidance_in, model.vector_in)
        outputs["vec"] = conditioning(*parts, t, guidance, pooled, torch.float32)
        outputs["t_emb"] = sinusoids(t, 256)
    converted = model.state_dict()
    for name in case["outputs"]:
        if name.startswith("bfl."):
            outputs[name] = converted[name.removeprefix("bfl.")]
    return outputs


# The cases have no table of slices: their notes say which part of an output is stored.


def chroma(
    model: ChromaTransformer,
    img: Tensor,
    txt: Tensor,
    t: Tensor,
    guidance: Tensor,
    size: tuple[int, int],
    lengths: list[int],
) -> dict[str, Tensor]:
    whole = txt.shape[1]
    counted = [min(length + 1, whole) for length in lengths]
    return {
        "mod_vectors": model.modulation_vectors(t, guidance, torch.float32)[:, ::3],
        "out_guidance": model(img, txt, t, guidance, None, size, counted),
        "out_guidance0": model(img, txt, t, torch.zeros(2), None, size, counted),
        "out_fullmask": model(img, txt, t, guidance, None, size),
    }


def controlled(
    folder: Path, model: StreamTransformer, case: dict[str, Any], recipe: ModuleType, given: dict[str, Any]
) -> dict[str, Tensor]:
    file = folder / "controlnet.safetensors"
    weights = {
        key: recipe.weight("controlnet." + key, tuple(shape), case["seed"])
        for key, (shape, _) in case["controlnet_checkpoint"].items()
    }
    save_safetensors(weights, file)
    net = load_controlnet(file, torch.float32, "cpu")
    img, txt, pooled = given["img"], given["txt"], given["y"]
    t, guidance = torch.tensor(given["timesteps"]), torch.tensor(given["guidance"])
    size, lengths = tuple(given["packed_hw"]), given["txt_lengths"]
    control = given["controlnet_cond"] * 20
    asked = (t, guidance, pooled, size, lengths)
    residuals = net(img, control, txt, *asked)
    singles = [given[f"single_residual.{i}"] * 0.5 for i in range(2)]
    return {
        "residual.0": residuals[0][..., ::4],
        "residual.1": residuals[1][..., ::4],
        "hint": net.input_hint_block(control),
        "out_controlnet": model(img, txt, *asked, residuals=residuals),
        "out_single_residuals": model(img, txt, *asked, single_residuals=singles),
        "out_plain": model(img, txt, *asked),
    }


def load(folder: Path, case: dict[str, Any], recipe: ModuleType) -> StreamTransformer:
    file = folder / "model.safetensors"
    save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), file)
    model_type = "chroma" if "approximator_depth" in case["config"] else "flux"
    return load_transformer(file, model_type, torch.float32, "cpu")
