"""Whole pictures of FLUX.1 and Chroma transformers, from the schedule to the last latents."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.diffusion.flow import log_shift
from library.diffusion.flow_sampling import sampling_schedule
from library.files.weights import save_safetensors
from library.models.architecture import Condition, ImageRequest
from library.models.attention import AttentionMode
from library.models.flux.checkpoint import load_transformer
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.patches import pack, unpack
from library.models.flux.sampling import denoised, packed_noise

CPU = torch.device("cpu")


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    given = {
        name: recipe.tensor(name, entry["shape"], case["seed"]) if entry["kind"] == "tensor" else entry["value"]
        for name, entry in case["inputs"].items()
    }
    dev = recipe.state_dict(case["checkpoint"], case["seed"])
    chroma = recipe.state_dict(case["chroma_checkpoint"], case["seed"])
    models = {
        "dev": loaded(dev, "flux"),
        "schnell": loaded({key: value for key, value in dev.items() if not key.startswith("guidance_in.")}, "flux"),
        "chroma": loaded({key.removeprefix("chroma."): value for key, value in chroma.items()}, "chroma"),
    }

    def picture(model: str, *, masked: bool = False, cfg: bool = False, guidance: float = 0.0, **extras: Any) -> Tensor:
        scale = given["cfg_scale"] if cfg else 1.0
        request = ImageRequest("", steps=given["steps"], scale=scale, guidance_scale=guidance, extras=extras)
        return pack(latents(models[model], given, request, masked))

    guidance = given["guidance"]
    outputs = {
        "dev": picture("dev", guidance=guidance),
        "dev_mask": picture("dev", masked=True, guidance=guidance),
        "dev_cfg": picture("dev", masked=True, cfg=True, guidance=guidance),
        "schnell_noshift": picture("schnell", guidance=guidance, flow_shift=1.0),
        "chroma_cfg": picture("chroma", masked=True, cfg=True),
        "chroma_nocfg": picture("chroma", masked=True, guidance=guidance),
        "timesteps": sampling_schedule(given["steps"], math.exp(log_shift(20))),
        "timesteps_noshift": sampling_schedule(given["steps"]),
        "noise_seed42_1x20x64": pack(packed_noise(42, 80, 64, 16))[:, ::5, ::8],
    }
    return outputs | {"dev_unpacked": unpack(outputs["dev"], tuple(given["packed_hw"]))[:, :, ::2]}


def loaded(tensors: dict[str, Tensor], model_type: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_safetensors(tensors, file)
        return load_transformer(file, model_type, torch.float32, CPU, AttentionMode.SDPA)


def latents(model: Any, given: dict[str, Any], request: ImageRequest, masked: bool) -> Tensor:
    size = tuple(given["packed_hw"])
    counted = [*given["txt_lengths"], *given["neg_txt_lengths"]]
    if isinstance(model, ChromaTransformer):  # attends to one token of padding
        counted = [length + 1 for length in counted]

    def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        lengths = counted[: len(x)] if masked else None
        told = (cond.text["txt"], t / 1000, cond.guidance, cond.text["y"])
        return unpack(model(pack(x), *told, size, lengths), size)

    cond = Condition({"txt": given["txt"], "y": given["y"]})
    uncond = Condition({"txt": given["neg_txt"], "y": given["neg_y"]})
    return denoised(predict, unpack(given["noise"], size), cond, uncond, request)
