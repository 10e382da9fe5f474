"""What the trainer, the caches, the previews and the inference scripts ask of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.diffusion.process import Process
from library.files.formats import LatentFormat, TextFormat
from library.flags.settings import Settings

OnWeight = Callable[[str, Tensor], Tensor]
"""Called with each weight's name and value as stored while a denoiser is read; its answer takes the weight's place."""

Generators = torch.Generator | list[torch.Generator] | None
"""One for all rows of a batch, one for each, or the global one."""


@dataclass
class Condition:
    """Everything a denoiser is told besides the noisy latents and the time."""

    text: dict[str, Tensor]
    """[B, ...] each."""
    sizes: Tensor | None = None
    """[B, 6] original height and width, crop top and left, target height and width (SDXL)."""
    guidance: Tensor | None = None
    """[B], guidance-distilled models."""
    lengths: tuple[int, ...] | None = None
    """[B] tokens of the text that count in each row; None is all of them."""
    control: Tensor | None = None
    """[B, 3, H, W] in [-1, 1], the picture that a ControlNet is shown."""

    def rows(self, rows: Sequence[int]) -> Condition:
        """The sub-batch `rows`."""
        index = list(rows)

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        text = {name: value[index] for name, value in self.text.items()}
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in index)
        return Condition(text, pick(self.sizes), pick(self.guidance), lengths, pick(self.control))

    def followed_by(self, other: Condition) -> Condition:
        """A batch of these rows and then those of `other`, which is told the same kinds of things."""

        def join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None or second is None else torch.cat([first, second])

        text = {name: torch.cat([value, other.text[name]]) for name, value in self.text.items()}
        lengths = None if self.lengths is None or other.lengths is None else (*self.lengths, *other.lengths)
        joined = [join(getattr(self, name), getattr(other, name)) for name in ("sizes", "guidance", "control")]
        return Condition(text, joined[0], joined[1], lengths, joined[2])


@dataclass(frozen=True)
class ImageRequest:
    """One picture to be made; None leaves the choice to the family's default."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    scale: float | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Options only some families know, such as `cfg_trunc_ratio`."""


@dataclass(frozen=True)
class TokenCount:
    """How one text encoder reads a caption."""

    tokens: int
    """Tokens of the whole caption, without marks."""
    room: int
    """Tokens that are read."""
    cut: str
    """The text of what is beyond; empty when all of it is read."""


@dataclass(frozen=True)
class SwapGroup:
    """A list of blocks in running order, and how many of them `--blocks_to_swap` takes off the device."""

    blocks: nn.ModuleList
    num_swapped: int


@dataclass(frozen=True)
class QuantizedLayers:
    """Which layers of a denoiser `--fp8_scaled` rounds, by parts of their names."""

    targets: tuple[str, ...]
    excluded: tuple[str, ...] = ()


class AbsentEncoder(nn.Module):
    """Stands in a list of text encoders for one that is not in memory, because its answers come from a cache."""


class Architecture(ABC):
    """One model family. Dimensions are inferred from the checkpoint, so a small or pruned model needs no config.

    On the device "meta" the `load_` methods read the headers of the files and nothing else: the models have their
    sizes and no weights, and every mistake that the keys and shapes tell is raised.
    """

    name: ClassVar[str]
    bucket_multiple: ClassVar[int]
    encoder_prefixes: ClassVar[tuple[str, ...]] = ("lora_te",)
    """What the names of adapters on each text encoder begin with."""
    trained_beside_cache: ClassVar[frozenset[int]] = frozenset()
    """Which text encoders, counted from 0, can be trained while the answers of the others come from a cache."""
    picture_options: ClassVar[frozenset[str]] = frozenset()
    """Keys of prompt files that this family reads, of those that only some do."""
    latents: LatentFormat
    text: TextFormat
    process: Process
    quantized: ClassVar[QuantizedLayers | None] = None
    """None where float8 with scales is not worth it: U-Nets are mostly convolutions."""
    quantized_in_encoders: ClassVar[QuantizedLayers] = QuantizedLayers(("",))
    """What --fp8_base rounds in text encoders that stay for the training."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        """The family's text encoders, in order, in eval mode and without gradients."""

    def load_text_encoder(self, number: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """One of them by itself, for those that give each a number format of its own."""
        return self.load_text_encoders(dtype, device)[number]

    @abstractmethod
    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The autoencoder, in eval mode and without gradients."""

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        """The U-Net or transformer, in eval mode and without gradients."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and word weights of training captions, [B, ...] each, on the CPU."""

    def token_counts(self, caption: str) -> list[TokenCount]:
        """How long `caption` is for each text encoder, for the user to see."""
        return []

    @abstractmethod
    def encode_text(self, encoders: Sequence[nn.Module | None], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the encoders make of `tokens`; an absent encoder leaves its keys out."""

    def encode_prompts(self, encoders: Sequence[nn.Module | None], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Like `encode_text(tokenize(...))`, for making pictures: one call for all prompts of a picture."""
        return self.encode_text(encoders, self.tokenize(prompts))

    @abstractmethod
    def encode_image(self, vae: nn.Module, pixels: Tensor, generator: Generators = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, C, h, w] as the cache holds it."""

    @abstractmethod
    def vae_id(self) -> str:
        """What names the VAE's weights: caches made with other weights are stale."""

    def text_encoder_id(self) -> str:
        """What names the text encoders' weights and all else that decides their answers besides `text.must_match`."""
        raise ValueError(f"{self.name} models have no cache of text: their encoder is small and runs at every step")

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Latents as cached -> as the denoiser takes them."""
        return latents

    @abstractmethod
    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Latents as the denoiser takes them -> [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """[B, C, h, w], [B] -> [B, C, h, w]: the only place that packs, divides t or adds size embeddings."""

    @abstractmethod
    def sample(self, denoiser: nn.Module, cond: Condition, uncond: Condition | None, request: ImageRequest) -> Tensor:
        """Latents [1, C, h, w] of one picture, as `decode_latents` takes them; `request` is complete."""

    @abstractmethod
    def complete_request(self, request: ImageRequest) -> ImageRequest:
        """`request` with the family's defaults filled in and its size brought to the family's grid."""

    def condition(
        self, text: dict[str, Tensor], sizes: Tensor | None = None, lengths: tuple[int, ...] | None = None
    ) -> Condition:
        """Text encodings and sizes [B, 6] as this family's denoiser wants them.

        `lengths` [B] are the tokens in each row of `text.mask`, if somebody has counted them already.
        """
        return Condition(text)

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks of the denoiser in running order, each of which takes its tensors by position.

        Memory is saved block by block: each can be recomputed in backward, compiled, or have its weights streamed.
        """

    @abstractmethod
    def encoder_blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The same for one of the text encoders, for when it is trained."""

    def swap_groups(self, denoiser: nn.Module, blocks_to_swap: int) -> list[SwapGroup]:
        """Block lists in running order with their share of --blocks_to_swap.

        Raises:
            ValueError: there are not so many, or weights of this family cannot be streamed.
        """
        raise ValueError(f"--blocks_to_swap is not supported for {self.name}")

    def vector_layers(self, denoiser: nn.Module) -> list[nn.Linear]:
        """Linear layers in the blocks that are given one vector for each sample, outside the forward of their block.

        A matrix times a vector is so little work that the processor can do it where the weights wait.
        """
        return []

    def network_views(self, text_encoders: Sequence[nn.Module]) -> list[nn.Module]:
        """The encoders as networks know them: the paths of their modules are the names of LoRA keys."""
        return list(text_encoders)

    def adaptable_layers(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, tuple[int, ...]]:
        """What other programs call each layer that a network's file may change -> the shape of its weight.

        ComfyUI, A1111 and diffusers look a name up as `lora_unet_` or `lora_te_` and the path of the layer, with `_`
        for every dot. Call it before a network stands in the layers.
        """
        parts = {"lora_unet": denoiser} | dict(
            zip(self.encoder_prefixes, self.network_views(text_encoders), strict=False)
        )
        return {
            f"{prefix}_{path.replace('.', '_')}": tuple(module.weight.shape)
            for prefix, part in parts.items()
            for path, module in part.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor)
        }

    @abstractmethod
    def base_model_version(self) -> str:
        """What `ss_base_model_version` says."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """ss_* entries only this family has."""

    @abstractmethod
    def model_spec(self) -> dict[str, str]:
        """architecture, implementation, resolution and prediction_type of the modelspec fields."""

    def unused_flags(self) -> Mapping[str, str]:
        """Flag -> why it has no effect with this family."""
        return {}


BLOCKS_THAT_STAY = 2
"""Of each list of blocks, as recorded: --blocks_to_swap may leave no fewer on the device."""


def one_swap_group(blocks: nn.ModuleList, blocks_to_swap: int) -> list[SwapGroup]:
    """All of `blocks_to_swap` from one list.

    Raises:
        ValueError: it has not so many.
    """
    most = max(len(blocks) - BLOCKS_THAT_STAY, 0)
    if blocks_to_swap > most:
        raise ValueError(_too_many(blocks_to_swap, most, f"{len(blocks)} blocks"))
    return [SwapGroup(blocks, blocks_to_swap)]


def double_and_single_swap_groups(
    double_blocks: nn.ModuleList, single_blocks: nn.ModuleList, blocks_to_swap: int
) -> list[SwapGroup]:
    """Half of `blocks_to_swap` from the double blocks; for each of the rest two single ones, which are half as large.

    Raises:
        ValueError: one of the lists has not so many.
    """
    most_double, most_single = len(double_blocks) - BLOCKS_THAT_STAY, len(single_blocks) - BLOCKS_THAT_STAY

    def shares(number: int) -> tuple[int, int]:
        return number // 2, 2 * (number - number // 2)

    def fits(number: int) -> bool:
        double, single = shares(number)
        return double <= max(most_double, 0) and single <= max(most_single, 0)

    if not fits(blocks_to_swap):
        most = max(number for number in range(blocks_to_swap) if fits(number))
        has = f"{len(double_blocks)} double and {len(single_blocks)} single blocks"
        raise ValueError(_too_many(blocks_to_swap, most, has))
    double, single = shares(blocks_to_swap)
    return [SwapGroup(double_blocks, double), SwapGroup(single_blocks, single)]


def _too_many(asked: int, most: int, has: str) -> str:
    return f"--blocks_to_swap {asked}: this model has {has} and can swap {most} at most"
