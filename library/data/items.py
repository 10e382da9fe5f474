"""What flows through the data room: one image of the collection, one request for a batch, one batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.levels import COLOUR, SHARE, Scale


@dataclass
class CachedLatents:
    """The encoded form of one image as its bucket shows it; arrays are float32 or the VAE's dtype."""

    latents: np.ndarray | Tensor
    """[C, h, w]"""
    original_size: tuple[int, int]
    """Width and height of the source image."""
    crop_ltrb: tuple[float, float, float, float]
    """Where the whole image would lie inside the bucket, in bucket pixels (SDXL's crop condition)."""
    flipped: np.ndarray | Tensor | None = None
    """[C, h, w] of the mirrored image, when the subset flips."""
    alpha_mask: np.ndarray | None = None
    """[H, W] in 0..1, in bucket pixels."""


@dataclass(frozen=True)
class Encoding:
    """What the text encoders made of one caption, without the rows of zeros at its end."""

    arrays: dict[str, Tensor]
    """[...] each, no batch dimension."""
    lengths: tuple[int, ...]
    """For each group of arrays by token, the rows with those zeros."""


@dataclass
class ImageItem:
    """One image of the collection, with what the scan found out about it."""

    path: Path
    caption: str
    num_repeats: int
    is_reg: bool
    subset: int
    """Index of its subset in the dataset's settings."""
    size: tuple[int, int]
    """Width and height, after EXIF rotation."""
    bucket: tuple[int, int] = (0, 0)
    """Width and height of the training picture."""
    resized: tuple[int, int] = (0, 0)
    """Width and height it is scaled to before the crop to `bucket`."""
    conditioning_path: Path | None = None
    latents: CachedLatents | None = field(default=None, repr=False)
    """Filled when latents are cached in memory."""
    latents_file: Path | None = None
    """Set when latents are cached on disk."""
    text: list[Encoding] = field(default_factory=list, repr=False)
    """The variants of the caption, filled when text is cached in memory."""
    text_file: Path | None = None
    """Set when text is cached on disk."""
    text_variants: int = 0
    """How many variants of the caption are cached."""


@dataclass(frozen=True)
class BatchRequest:
    """Everything that decides one batch; a pure value, so that any worker can answer it."""

    dataset: int
    items: tuple[int, ...]
    """Indices into the dataset's items; a repeated image stands here once per repeat."""
    draws: tuple[int, ...]
    """One number per item that seeds its flips, crops and captions."""
    epoch: int
    """1 for the first."""
    step: int
    """Optimizer steps finished when the batch is used."""
    total_steps: int
    """Optimizer steps of the whole run."""
    weight: float = 1.0
    """0 for a batch that only keeps this rank in step with the others."""


@dataclass
class Sizes:
    """The size conditions of SDXL, [B, 2] each, as (height, width) or (top, left)."""

    original: Tensor
    crop_top_left: Tensor
    target: Tensor

    def to(self, device: torch.device) -> Sizes:
        """The same sizes on `device`."""
        sides = (self.original, self.crop_top_left, self.target)
        return Sizes(*(side.to(device, non_blocking=True) for side in sides))

    def pin_memory(self) -> Sizes:
        """The same sizes in page-locked memory."""
        return Sizes(*(side.pin_memory() for side in (self.original, self.crop_top_left, self.target)))


@dataclass
class Batch:
    """Images of one bucket. The dataset fills it and knows no model.

    Pictures and masks may be uint8, the levels 0 to 255, until `to` makes the numbers of them that are meant.
    """

    captions: list[str]
    loss_weights: Tensor
    """[B]"""
    pixels: Tensor | None = None
    """[B, 3, H, W] uint8, or in [-1, 1], when latents are not cached."""
    latents: Tensor | None = None
    """[B, C, h, w] as cached."""
    text: dict[str, Tensor] = field(default_factory=dict)
    """Cached encodings, [B, ...] each."""
    text_lengths: tuple[int, ...] | None = None
    """[B] tokens that count in them, for a family whose denoiser must know: read here, where nothing waits for it."""
    masks: Tensor | None = None
    """[B, 1, H, W] uint8, or in [0, 1]."""
    conditioning: Tensor | None = None
    """[B, 3, H, W] uint8, or in [-1, 1], the second images that a control network is shown."""
    sizes: Sizes | None = None
    keep_prior: tuple[int, ...] = ()
    """Rows whose target is the untrained model's answer."""
    network_multipliers: Tensor | None = None
    """[B], None when all are 1."""
    paths: list[str] = field(default_factory=list)
    """Where the images came from, for messages."""
    epoch: int = 1
    step: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, its pictures and masks in float32.

        Nothing waits for the copies when the tensors are pinned.
        """

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        def numbers(levels: Tensor | None, scale: Scale) -> Tensor | None:
            return None if levels is None else scale.numbers(levels.to(device, non_blocking=True))

        return replace(
            self,
            loss_weights=self.loss_weights.to(device, non_blocking=True),
            pixels=numbers(self.pixels, COLOUR),
            latents=moved(self.latents),
            text={name: value.to(device, non_blocking=True) for name, value in self.text.items()},
            masks=numbers(self.masks, SHARE),
            conditioning=numbers(self.conditioning, COLOUR),
            sizes=None if self.sizes is None else self.sizes.to(device),
            network_multipliers=moved(self.network_multipliers),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU need not wait."""

        def pinned(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.pin_memory()

        return replace(
            self,
            loss_weights=self.loss_weights.pin_memory(),
            pixels=pinned(self.pixels),
            latents=pinned(self.latents),
            text={name: value.pin_memory() for name, value in self.text.items()},
            masks=pinned(self.masks),
            conditioning=pinned(self.conditioning),
            sizes=None if self.sizes is None else self.sizes.pin_memory(),
            network_multipliers=pinned(self.network_multipliers),
        )
