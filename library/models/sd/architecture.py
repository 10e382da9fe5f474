"""Stable Diffusion 1.x and 2.x, as the trainer, the caches and the previews see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from library.files.formats import LatentFormat, TextFormat
from library.flags.dreambooth import DreamBoothFlags
from library.flags.run import AttentionFlags
from library.flags.settings import Settings
from library.models.architecture import Condition, OnWeight, TokenCount
from library.models.attention import attention_mode
from library.models.sd.checkpoint import load_text_encoder, load_unet
from library.models.sd.folder_files import FolderParts, folder_files
from library.models.sd.model_writer import FOLDER_KINDS, ModelWriter
from library.models.sd.unet import UNet
from library.models.text.clip import TextEncoder, check_vocabulary, encode_caption, encode_prompt
from library.models.text.tokens import (
    V1_TOKENIZER,
    V2_TOKENIZER,
    Tokenizer,
    count_tokens,
    load_tokenizer,
    tokenize_rows,
    without_padding,
)
from library.models.unet_architecture import ROWS_OF_A_PREVIEW, WORDS_PER_ROW, UNetArchitecture

META = torch.device("meta")


class StableDiffusion(UNetArchitecture):
    """U-Net, one CLIP text encoder, four latent channels; predicts the noise, or the velocity (2.x 768)."""

    name: ClassVar[str] = "sd"
    bucket_multiple: ClassVar[int] = 64
    latent_scale: ClassVar[float] = 0.18215
    latents = LatentFormat(channels=4, stride=8, suffix="_sd.npz", reads_stem_files=True)
    text = TextFormat(suffix="", arrays=("context",))

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.clip_skip = self.model.clip_skip or 1

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        """CLIP-L (1.x) or OpenCLIP-H (2.x)."""
        encoder = load_text_encoder(self.path, self.model.v2, dtype, device)
        check_vocabulary(encoder, self.tokenizer, str(self.path))
        layers = encoder.config.num_hidden_layers
        if self.clip_skip > layers:
            raise ValueError(f"--clip_skip {self.clip_skip}: the text encoder of {self.path} has {layers} layers")
        return [encoder]

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        """The U-Net, with the attention that the flags ask for."""
        mode = attention_mode(self.settings[AttentionFlags])
        return load_unet(self.path, self.model.v2, dtype, device, mode, on_weight)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the version."""
        hub_id, subfolder = V2_TOKENIZER if self.model.v2 else V1_TOKENIZER
        tokenizer: Tokenizer = load_tokenizer(hub_id, subfolder, self.model.tokenizer_cache_dir, self.tokenizer_folder)
        return tokenizer

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` int64 [B, rows, 77] and, with --weighted_captions, `weights` [B, rows, 77].

        With --no_token_padding rows are as long as the longest caption.
        """
        rows, weighted = self.caption_room // WORDS_PER_ROW, self.weighted_captions
        tokens = tokenize_rows(self.tokenizer, captions, max_rows=rows, min_rows=rows, weighted=weighted)
        if self.settings.get(DreamBoothFlags).no_token_padding:
            tokens = without_padding(tokens, self.tokenizer.eos_token_id)
        return {"input_ids": tokens.ids, "weights": tokens.weights} if weighted else {"input_ids": tokens.ids}

    def token_counts(self, caption: str) -> list[TokenCount]:
        """Of the one encoder; --max_token_length is its room."""
        count, cut = count_tokens(self.tokenizer, caption, self.caption_room, self.weighted_captions)
        return [TokenCount(count, self.caption_room, cut)]

    def encode_text(self, encoders: Sequence[nn.Module | None], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """`context` [B, 75 * rows + 2, D]."""
        encoder = encoders[0] if encoders else None
        if encoder is None:
            return {}
        return {"context": encode_caption(encoder, tokens["input_ids"], tokens.get("weights"), self.clip_skip)}

    def encode_prompts(self, encoders: Sequence[nn.Module | None], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`context` [B, 77 * rows, D]; brackets are weights, and all prompts get as many rows as the longest needs."""
        rows = tokenize_rows(self.tokenizer, prompts, max_rows=ROWS_OF_A_PREVIEW, weighted=True)
        return {"context": encode_prompt(cast(nn.Module, encoders[0]), rows, self.clip_skip)}

    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Takes x [B, 4, h, w], t [B] in 0..999 and `context` [B, T, D] -> [B, 4, h, w]."""
        answer: Tensor = denoiser(x, t, cond.text["context"])
        return answer

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Those on the way down, the middle, those on the way up."""
        return cast(UNet, denoiser).blocks()

    def encoder_blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The layers of CLIP."""
        return list(cast(TextEncoder, encoder).encoder.layers)

    def network_views(self, text_encoders: Sequence[nn.Module]) -> list[nn.Module]:
        """Each encoder under the name `text_model`, which published LoRA keys hold and transformers 5 has dropped."""
        return [nn.ModuleDict({"text_model": encoder}) for encoder in text_encoders]

    def model_writer(self, kind: str, dtype: torch.dtype | None) -> ModelWriter:
        """What writes whole models made from this one; `kind` is that of --save_model_as, `dtype` that of the files."""
        vae = None if self.model.vae is None else self.vae_path
        small: dict[str, bytes] = {}
        if kind in FOLDER_KINDS:
            unet = cast(UNet, self.load_denoiser(torch.float32, META))
            text = load_text_encoder(self.path, self.model.v2, torch.float32, META)
            pixels = cast(AutoencoderKL, self.load_vae(torch.float32, META))
            parts = FolderParts(unet.shape, text, pixels, cast(CLIPTokenizer, self.tokenizer))
            small = folder_files(parts, self.path, self.model.v_parameterization, self.zero_terminal_snr)
        return ModelWriter(self.path, vae, self.model.v2, kind, dtype, small)

    def base_model_version(self) -> str:
        """One of sd_v1, sd_v1_v, sd_v2, sd_v2_v."""
        return ("sd_v2" if self.model.v2 else "sd_v1") + ("_v" if self.model.v_parameterization else "")

    def model_spec(self) -> dict[str, str]:
        """The modelspec fields that follow from the version."""
        v2, v = self.model.v2, self.model.v_parameterization
        version = ("stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512") if v2 else "stable-diffusion-v1"
        return {
            "architecture": version,
            "implementation": "diffusers",
            "resolution": "768x768" if v2 and v else "512x512",
            "prediction_type": "v" if v else "epsilon",
        }
