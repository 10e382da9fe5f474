"""A LoRA of the difference between two models turns the one into the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from networks import flux_extract_lora
from tests.networks.lora_files import effects, lora, model, save


def tuned() -> dict[str, Tensor]:
    """The small model with a LoRA of rank 2 merged in, and another first layer, which is in no block."""
    changes = effects(lora(rank=2))
    tensors = model()
    for key in tensors:
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        tensors[key] = tensors[key] + changes.get(name, torch.zeros(()))
    return tensors


def extract(folder: Path, before: dict[str, Tensor], after: dict[str, Tensor], *words: str) -> int:
    models = ["--model_org", str(save(folder, "org", before)), "--model_tuned", str(save(folder, "tuned", after))]
    return flux_extract_lora.main([*models, "--save_to", str(folder / "out.safetensors"), *words])


def test_a_change_of_the_rank_is_found_exactly(tmp_path: Path) -> None:
    assert extract(tmp_path, model(), tuned(), "--dim", "2", "--clamp_quantile", "1") == 0
    found = effects(load_file(tmp_path / "out.safetensors"))
    expected = effects(lora(rank=2))
    assert sorted(found) == sorted(name for name in expected if "_blocks_" in name)
    for name, effect in found.items():
        assert torch.allclose(effect, expected[name], atol=1e-4), name


def test_prefixes_may_differ_between_the_two(tmp_path: Path) -> None:
    after = {f"model.diffusion_model.{key}": value for key, value in tuned().items()}
    assert extract(tmp_path, model(), after, "--dim", "2", "--save_precision", "bf16") == 0
    tensors = load_file(tmp_path / "out.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {"torch.bfloat16"}
    assert float(tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 2


def test_nonsense_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refused(before: dict[str, Tensor], after: dict[str, Tensor], *words: str) -> str:
        caplog.clear()
        assert extract(tmp_path, before, after, *words) == 1
        return caplog.messages[-1]

    deeper = tuned() | {"double_blocks.1.img_attn.proj.weight": torch.ones(8, 8)}
    assert "lora_unet_double_blocks_1_img_attn_proj is in one of them only" in refused(model(), deeper)
    wider = tuned() | {"single_blocks.0.linear2.weight": torch.ones(8, 41)}
    assert "the models differ in size" in refused(model(), wider)
    broken = tuned() | {"single_blocks.0.linear2.weight": torch.full((8, 40), float("nan"))}
    assert "single_blocks.0.linear2.weight of" in refused(model(), broken)
    assert "--clamp_quantile 1.5" in refused(model(), tuned(), "--clamp_quantile", "1.5")
    assert "is a LoRA" in refused(lora(), tuned())
    assert "no FLUX.1 and no Chroma" in refused(model(), {"down_blocks.0.weight": torch.ones(2, 2)})
    assert not (tmp_path / "out.safetensors").exists()
