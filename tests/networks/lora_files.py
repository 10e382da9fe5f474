"""Small FLUX models and LoRAs for them, as files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, MLP = 8, 32

LAYERS = {
    "img_in": (HIDDEN, 4),
    "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.img_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.0.txt_mlp.0": (MLP, HIDDEN),
    "single_blocks.0.linear1": (3 * HIDDEN + MLP, HIDDEN),
    "single_blocks.0.linear2": (HIDDEN, HIDDEN + MLP),
}
"""Some layers of a FLUX transformer: path -> rows and columns."""
CLIP = {"text_model.encoder.layers.0.self_attn.q_proj": (6, 6), "text_model.encoder.layers.0.mlp.fc1": (12, 6)}
T5 = {"encoder.block.0.layer.0.SelfAttention.q": (5, 7)}


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def model(layers: dict[str, tuple[int, int]] = LAYERS, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for path, shape in layers.items():
        tensors[f"{prefix}{path}.weight"] = torch.randn(shape, generator=generator(path))
        tensors[f"{prefix}{path}.bias"] = torch.randn(shape[:1], generator=generator(path + "b"))
    return tensors


def lora(
    layers: dict[str, tuple[int, int]] = LAYERS, prefix: str = "lora_unet", rank: int = 2, alpha: float = 1.0
) -> dict[str, Tensor]:
    tensors = {}
    for path, (rows, columns) in layers.items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator(f"{path}{rank}{alpha}"))
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator(f"{name}{rank}{alpha}"))
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def effects(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each adapter adds to its layer."""
    names = [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")]
    found = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        found[name] = float(tensors[f"{name}.alpha"]) / len(down) * up.float() @ down.float()
    return found


def save(folder: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata)
    return path
