"""Prompt -> picture with any model family: which part is read when, and what of it stays."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from library.generation.float8 import RoundedWhileRead, round_linear_layers
from library.generation.images import to_image
from library.generation.picture_latents import picture_latents
from library.models.architecture import Architecture, ImageRequest, QuantizedLayers

Part = TypeVar("Part")


@dataclass(frozen=True)
class Numbers:
    """The number format of each part."""

    text_encoders: tuple[torch.dtype, ...]
    """In the order of the family."""
    denoiser: torch.dtype
    vae: torch.dtype
    compute: torch.dtype = torch.bfloat16
    """What parts in float8 calculate in."""

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """What a part held in `dtype` is read and calculated in."""
        return self.compute if dtype.itemsize == 1 else dtype


class Adapters(Protocol):
    """What is put on the models as they are read, such as LoRA."""

    @property
    def merge(self) -> bool:
        """Whether it becomes part of the weights, which then must not be in float8 yet."""
        ...

    def on_text_encoders(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        """Change the text encoders, in the order of the family."""
        ...

    def on_denoiser(self, denoiser: nn.Module, device: torch.device) -> None:
        """Change the denoiser."""
        ...


@dataclass
class Pipeline:
    """Makes pictures, one after the other, with parts that are read when the first picture needs them.

    The text encoders have encoded before the denoiser is read. With `one_picture` every part is dropped after its
    work, so that memory never holds more than the largest; with `offload` parts wait in main memory while another
    works; otherwise all stay on `device`.
    """

    arch: Architecture
    device: torch.device
    numbers: Numbers
    one_picture: bool = False
    offload: bool = False
    adapters: Adapters | None = None
    _parts: dict[str, list[nn.Module]] = field(default_factory=dict)

    @torch.no_grad()
    def make(self, request: ImageRequest) -> Image.Image:
        """The picture of a complete `request`; ValueError when what comes out is not finite."""
        text = self._at_work("text encoders", self._read_text_encoders, lambda parts: self._encode(parts, request))
        latents = self._at_work(
            "denoiser",
            self._read_denoiser,
            lambda parts: picture_latents(self.arch, parts[0], text, request, self.device),
        )
        check_finite(latents, "the denoiser's answer")
        pixels = self._at_work("vae", self._read_vae, lambda parts: self.arch.decode_latents(parts[0], latents))
        check_finite(pixels, "the picture")
        return to_image(pixels[0])

    def _encode(self, encoders: Sequence[nn.Module], request: ImageRequest) -> dict[str, Tensor]:
        """The rows of the prompt and of the negative prompt, as the denoiser takes numbers."""
        text = self.arch.encode_prompts(encoders, [request.prompt, request.negative_prompt])
        dtype = self.numbers.of(self.numbers.denoiser)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in text.items()}

    def _read_text_encoders(self) -> list[nn.Module]:
        numbers = self.numbers.text_encoders
        encoders = [
            self.arch.load_text_encoder(number, self.numbers.of(dtype), self.device)
            for number, dtype in enumerate(numbers)
        ]
        merged = self.adapters is not None and self.adapters.merge
        if self.adapters is not None and merged:
            self.adapters.on_text_encoders(self.arch.network_views(encoders), self.device)
        for encoder, dtype in zip(encoders, numbers, strict=True):
            if dtype.itemsize == 1:
                round_linear_layers(encoder)
        if self.adapters is not None and not merged:
            self.adapters.on_text_encoders(self.arch.network_views(encoders), self.device)
        return encoders

    def _read_denoiser(self) -> list[nn.Module]:
        dtype = self.numbers.of(self.numbers.denoiser)
        merged = self.adapters is not None and self.adapters.merge
        rounded = None
        if self.numbers.denoiser.itemsize == 1 and not merged:
            rounded = RoundedWhileRead(self.arch.quantized or QuantizedLayers(("",)))
        denoiser = self.arch.load_denoiser(dtype, self.device, rounded)
        if rounded is not None:
            rounded.attach(denoiser)
        if self.adapters is not None:
            self.adapters.on_denoiser(denoiser, self.device)
        if self.numbers.denoiser.itemsize == 1 and merged:
            round_linear_layers(denoiser)
        return [denoiser]

    def _read_vae(self) -> list[nn.Module]:
        return [self.arch.load_vae(self.numbers.vae, self.device)]

    def _at_work(self, name: str, read: Callable[[], list[nn.Module]], work: Callable[[list[nn.Module]], Part]) -> Part:
        """What `work` makes with the part `name`, which is on the device meanwhile."""
        parts = self._parts.pop(name, None) or read()
        done = work([part.to(self.device) for part in parts])
        if not self.one_picture:
            self._parts[name] = [part.to("cpu") for part in parts] if self.offload else parts
        del parts
        if (self.one_picture or self.offload) and self.device.type != "cpu":
            gc.collect()
            torch.get_device_module(self.device).empty_cache()
        return done


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError if `values`, which `what` names, hold infinity or no number."""
    if not values.isfinite().all():
        raise ValueError(f"{what} is not finite: half precision may have overflowed; try bf16, or float32 for the VAE")
