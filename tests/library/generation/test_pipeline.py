"""Are the parts of a model read in order, kept as asked, and does what they answer become a picture?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.generation.pipeline import Numbers, Pipeline
from library.models.architecture import Condition, ImageRequest

REQUEST = ImageRequest("four", "no", width=16, height=8, seed=1)
NUMBERS = Numbers((torch.float32, torch.bfloat16), torch.bfloat16, torch.float32)
CPU = torch.device("cpu")


class Toy:
    """Its pictures are one grey: the letters of the prompt minus those of the negative prompt, over 10."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.grey = 0.0

    def load_text_encoder(self, number: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        self.log.append(f"read text encoder {number} as {dtype}")
        return nn.Linear(1, 1).to(dtype)

    quantized = None

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: Any = None) -> nn.Module:
        self.log.append(f"read denoiser as {dtype}")
        return nn.Linear(1, 1)

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        self.log.append(f"read vae as {dtype}")
        return nn.Linear(1, 1)

    def network_views(self, encoders: Sequence[nn.Module]) -> list[nn.Module]:
        return list(encoders)

    def encode_prompts(self, encoders: Sequence[nn.Module], prompts: Sequence[str]) -> dict[str, Tensor]:
        self.log.append(f"encode with {[next(one.parameters()).dtype for one in encoders]}")
        return {"letters": torch.tensor([[float(len(prompt))] for prompt in prompts]), "mask": torch.ones(2, 1).long()}

    def condition(self, text: dict[str, Tensor], sizes: Tensor) -> Condition:
        return Condition(text, sizes)

    def sample(self, denoiser: nn.Module, cond: Condition, uncond: Condition, request: ImageRequest) -> Tensor:
        assert cond.text["letters"].dtype == torch.bfloat16 and cond.text["mask"].dtype == torch.int64
        assert cond.sizes is not None and cond.sizes.tolist() == [[8, 16, 0, 0, 8, 16]]
        self.grey = float(cond.text["letters"] - uncond.text["letters"]) / 10
        return torch.full((1, 4, 1, 2), self.grey)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


class Recorder:
    merge = False

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def on_text_encoders(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        self.log.append(f"adapt {len(encoders)} text encoders")

    def on_denoiser(self, denoiser: nn.Module, device: torch.device) -> None:
        self.log.append("adapt denoiser")


def pipeline_of(arch: Any, **options: Any) -> Pipeline:
    return Pipeline(arch, CPU, NUMBERS, **options)


def test_a_prompt_becomes_a_picture() -> None:
    picture = pipeline_of(Toy()).make(REQUEST)
    assert picture.size == (16, 8)
    assert picture.getpixel((0, 0)) == (153, 153, 153)  # 4 - 2 letters over 10 is 0.2


def test_text_is_encoded_before_the_denoiser_is_read_and_adapters_come_with_each_part() -> None:
    arch = Toy()
    pipeline_of(arch, adapters=Recorder(arch.log)).make(REQUEST)
    assert arch.log == [
        "read text encoder 0 as torch.float32",
        "read text encoder 1 as torch.bfloat16",
        "adapt 2 text encoders",
        "encode with [torch.float32, torch.bfloat16]",
        "read denoiser as torch.bfloat16",
        "adapt denoiser",
        "read vae as torch.float32",
    ]


@pytest.mark.parametrize("offload", [False, True])
def test_a_second_picture_finds_the_parts(offload: bool) -> None:
    arch = Toy()
    pipeline = pipeline_of(arch, offload=offload)
    pipeline.make(REQUEST)
    read = len(arch.log)
    pipeline.make(REQUEST)
    assert [line for line in arch.log[read:] if line.startswith("read")] == []


def test_parts_of_a_single_picture_are_dropped_after_their_work() -> None:
    pipeline = pipeline_of(Toy(), one_picture=True)
    pipeline.make(REQUEST)
    assert pipeline._parts == {}


def test_what_is_not_finite_makes_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Toy()
    monkeypatch.setattr(arch, "sample", lambda *args: torch.full((1, 4, 1, 1), float("nan")))
    with pytest.raises(ValueError, match="the denoiser's answer is not finite"):
        pipeline_of(arch).make(REQUEST)
