"""What the families with a U-Net share, Stable Diffusion 1.x to XL: files, autoencoder, noise schedule, samplers."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from library.diffusion.ddpm import DDPM
from library.diffusion.samplers import Scheduler, make_sampler
from library.flags.dataset import CaptionFlags
from library.flags.model import ModelFlags
from library.flags.monitor import PreviewFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture, Condition, Generators, ImageRequest
from library.models.ddpm_pictures import completed, denoised
from library.models.parts import MODEL_FLAG, VAE_FLAG, locate
from library.models.vae import sd as autoencoder

WORDS_PER_ROW = 75
ROWS_OF_A_PREVIEW = 3
"""Prompts of previews are cut after this many rows of 75 tokens, whatever --max_token_length says."""
SIDE_OF_A_PREVIEW = 512
"""In pixels, where a prompt says nothing."""


class UNetArchitecture(Architecture):
    """A U-Net on four latent channels and CLIP text encoders; predicts the noise, or the velocity."""

    picture_options: ClassVar[frozenset[str]] = frozenset({"sample_sampler"})
    latent_scale: ClassVar[float]
    """Brings the autoencoder's latents to unit variance."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.model = settings[ModelFlags]
        self.zero_terminal_snr = settings[NoiseFlags].zero_terminal_snr
        self.process = DDPM(settings[NoiseFlags], settings[LossFlags], self.model.v_parameterization)

    @cached_property
    def path(self) -> Path:
        """The file or folder of the model."""
        if not self.model.pretrained_model_name_or_path:
            raise ValueError(f"{MODEL_FLAG} is needed: a .safetensors or .ckpt file, a diffusers folder or a hub id")
        return locate(self.model.pretrained_model_name_or_path)

    @cached_property
    def vae_path(self) -> Path:
        """Where the autoencoder lies: in --vae, or in the model."""
        return self.path if self.model.vae is None else locate(self.model.vae, VAE_FLAG)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The model's folder, if it is one; it may hold tokenizers."""
        return self.path if self.path.is_dir() else None

    @property
    def caption_room(self) -> int:
        """Tokens of a caption that are read, without marks: --max_token_length."""
        return self.model.max_token_length or WORDS_PER_ROW

    @property
    def weighted_captions(self) -> bool:
        """Whether brackets in captions are weights."""
        return self.settings[CaptionFlags].weighted_captions

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The autoencoder of --vae, or of the model."""
        flag = MODEL_FLAG if self.model.vae is None else VAE_FLAG
        return autoencoder.load_vae(self.vae_path, self.name, flag, dtype, device)

    def encode_image(self, vae: nn.Module, pixels: Tensor, generator: Generators = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 4, H/8, W/8], drawn from the posterior."""
        return autoencoder.encode(cast(AutoencoderKL, vae), pixels, generator)

    def vae_id(self) -> str:
        """A hash of weights of the encoder half, the same for every layout of the file, in float32 or float16."""
        return self._vae_id

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Latents of unit variance."""
        return latents * self.latent_scale

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """[B, 4, h, w] of unit variance -> [B, 3, 8h, 8w] in [-1, 1]."""
        return autoencoder.decode(cast(AutoencoderKL, vae), latents / self.latent_scale)

    def sample(self, denoiser: nn.Module, cond: Condition, uncond: Condition | None, request: ImageRequest) -> Tensor:
        """Latents [1, 4, h, w] of unit variance, by the sampler that `request` names."""
        assert request.sampler, "a complete request"
        scheduler = self._scheduler(request.sampler)
        return denoised(partial(self.predict, denoiser), cond, uncond, request, scheduler, self.latents)

    def complete_request(self, request: ImageRequest) -> ImageRequest:
        """512x512, 30 steps, scale 7.5 and --sample_sampler where `request` says nothing; sides floored to 8.

        Raises ValueError for a sampler that is not known, or cannot do what this model needs.
        """
        sampler = request.sampler or self.settings[PreviewFlags].sample_sampler
        self._scheduler(sampler)
        return completed(request, sampler, SIDE_OF_A_PREVIEW)

    def metadata(self) -> dict[str, str]:
        """None but the shared ones."""
        return {}

    @cached_property
    def _vae_id(self) -> str:
        return autoencoder.vae_id(self.vae_path, self.name)

    def _scheduler(self, sampler: str) -> Scheduler:
        return make_sampler(sampler, self.model.v_parameterization, self.zero_terminal_snr)
