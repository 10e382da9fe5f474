"""Do LoRA files reach the part of the model that they are for, with their multipliers?"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.generation.loras import Loras, LoraWeights

CPU = torch.device("cpu")
BOTH = {"lora_te1_a.lora_up.weight": torch.ones(1), "lora_unet_b.lora_up.weight": torch.ones(1)}


class ToyNetwork(nn.Module):
    """Writes down what is done with it."""

    def __init__(self, log: list[Any], name: str, multiplier: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.log, self.name = log, name
        log.append((name, "made", multiplier))

    def apply_to(self, encoders: list[nn.Module], denoiser: nn.Module, on_encoders: bool, on_denoiser: bool) -> None:
        self.log.append((self.name, "applied", len(encoders), on_encoders, on_denoiser))

    def merge_to(self, encoders: Any, denoiser: Any, weights: dict[str, Tensor], dtype: Any, device: Any) -> None:
        self.log.append((self.name, "merged", sorted(weights)))

    def load_state_dict(self, weights: Any, strict: bool = True, assign: bool = False) -> Any:
        self.log.append((self.name, "loaded", sorted(weights)))

    def set_multiplier(self, multiplier: float) -> None:
        self.log.append((self.name, "multiplier", multiplier))


class ToyModule:
    """Knows layers of CLIP-L, `lora_te1`, and of a denoiser."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str,
        vae: None,
        encoders: list[nn.Module],
        denoiser: nn.Module,
        weights_sd: dict[str, Tensor],
        for_inference: bool,
    ) -> tuple[ToyNetwork, dict[str, Tensor]]:
        assert for_inference and bool(encoders) != bool(list(denoiser.parameters()))
        if any(key.startswith("lora_te2") for key in weights_sd):
            raise ValueError("none of the keys belongs to this model")
        return ToyNetwork(self.log, file, multiplier), weights_sd


def file_of(
    module: ToyModule, weights: dict[str, Tensor] = BOTH, name: str = "a", multiplier: float = 0.5
) -> LoraWeights:
    return LoraWeights(name, multiplier, weights, module)


def put(loras: Loras) -> nn.Linear:
    denoiser = nn.Linear(1, 1).to(torch.bfloat16)
    loras.on_text_encoders([nn.Identity(), nn.Linear(1, 1)], CPU)
    loras.on_denoiser(denoiser, CPU)
    return denoiser


def test_each_part_of_a_file_goes_to_its_model() -> None:
    module = ToyModule()
    put(Loras([file_of(module)]))
    te, unet = BOTH
    assert module.log == [
        *(("a", "made", 0.5), ("a", "applied", 2, True, False), ("a", "loaded", [te])),
        *(("a", "made", 0.5), ("a", "applied", 0, False, True), ("a", "loaded", [unet])),
    ]


def test_merged_files_change_weights_and_stand_nowhere() -> None:
    module = ToyModule()
    loras = Loras([file_of(module)], merge=True)
    put(loras)
    assert [entry[1] for entry in module.log] == ["made", "merged"] * 2
    with pytest.raises(ValueError, match="merged LoRA files keep the multiplier"):
        loras.set_multipliers([1.0])


def test_a_file_without_a_part_leaves_that_model_alone() -> None:
    module = ToyModule()
    put(Loras([file_of(module, {"lora_unet_b.alpha": torch.ones(1)})]))
    assert [entry[1] for entry in module.log] == ["made", "applied", "loaded"]


def test_multipliers_change_both_parts_of_each_file() -> None:
    module = ToyModule()
    loras = Loras([file_of(module), file_of(module, name="b")])
    put(loras)
    module.log.clear()
    loras.set_multipliers([0.25, 2.0])
    assert sorted(module.log) == [("a", "multiplier", 0.25)] * 2 + [("b", "multiplier", 2.0)] * 2
    with pytest.raises(ValueError, match="1 multipliers for 2 LoRA files"):
        loras.set_multipliers([1.0])


def test_text_encoders_of_another_model_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module, other = ToyModule(), {"lora_te2_a.alpha": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        put(Loras([file_of(module, other | {"lora_unet_b.alpha": torch.ones(1)})]))
    assert [entry[1] for entry in module.log] == ["made", "applied", "loaded"]
    assert "what it holds for text encoders is left out" in caplog.text
    with pytest.raises(ValueError, match="none of the keys"):
        put(Loras([file_of(module, other)]))
