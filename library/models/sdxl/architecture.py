"""Stable Diffusion XL, as the trainer, the caches and the previews see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from library.files.formats import LatentFormat, TextFormat
from library.flags.run import AttentionFlags
from library.models.architecture import AbsentEncoder, Condition, OnWeight, TokenCount
from library.models.attention import attention_mode
from library.models.embeddings import timestep_embedding
from library.models.sdxl.checkpoint import load_text_encoders, load_unet, text_encoder_id
from library.models.sdxl.pooled_text import PooledTextEncoder
from library.models.sdxl.unet import SdxlUNet
from library.models.text.clip import TextEncoder, check_vocabulary, joined_rows, weighted_prompt
from library.models.text.tokens import CLIP, V1_TOKENIZER, Tokenizer, count_tokens, load_tokenizer, tokenize_rows
from library.models.unet_architecture import ROWS_OF_A_PREVIEW, WORDS_PER_ROW, UNetArchitecture

BIGG_TOKENIZER = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
NUMBER_DIM = 256
"""Width of the sinusoids of each of the six sizes."""


class Sdxl(UNetArchitecture):
    """U-Net, CLIP-L and OpenCLIP bigG, four latent channels; it is told sizes and crops, and predicts the noise."""

    name: ClassVar[str] = "sdxl"
    bucket_multiple: ClassVar[int] = 32
    latent_scale: ClassVar[float] = 0.13025
    encoder_prefixes: ClassVar[tuple[str, ...]] = ("lora_te1", "lora_te2")
    latents = LatentFormat(channels=4, stride=8, suffix="_sdxl.npz", reads_stem_files=True)
    text = TextFormat(suffix="_te_outputs.npz", arrays=("hidden_state1", "hidden_state2", "pool2"))

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        """CLIP-L and OpenCLIP bigG."""
        first_words, second_words = self.tokenizers
        first, second = load_text_encoders(self.path, second_words.eos_token_id, dtype, device)
        check_vocabulary(first, first_words, f"{self.path} (CLIP-L)")
        check_vocabulary(second.text_model, second_words, f"{self.path} (OpenCLIP bigG)")
        return [first, second]

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        """The U-Net, with the attention that the flags ask for."""
        return load_unet(self.path, dtype, device, attention_mode(self.settings[AttentionFlags]), on_weight)

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Those of CLIP-L and OpenCLIP bigG: the same words, but the second fills up with the token 0."""
        cache, folder = self.model.tokenizer_cache_dir, self.tokenizer_folder
        first: Tokenizer = load_tokenizer(*V1_TOKENIZER, cache, folder, CLIP)
        second: Tokenizer = load_tokenizer(BIGG_TOKENIZER, "", cache, folder, CLIP.in_folder("tokenizer_2"))
        second.pad_token_id = 0
        return first, second

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `input_ids2` int64 [B, rows, 77]; with --weighted_captions `weights` and `weights2` too."""
        rows = self.caption_room // WORDS_PER_ROW
        return self._tokens(captions, rows, rows, self.weighted_captions)

    def token_counts(self, caption: str) -> list[TokenCount]:
        """Of both encoders; --max_token_length is their room."""
        room = self.caption_room
        counts = [count_tokens(tokenizer, caption, room, self.weighted_captions) for tokenizer in self.tokenizers]
        return [TokenCount(count, room, cut) for count, cut in counts]

    def encode_text(self, encoders: Sequence[nn.Module | None], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """`hidden_state1` [B, 75 * rows + 2, D1], `hidden_state2` [B, 75 * rows + 2, D2] and `pool2` [B, P]."""
        states = self._states(encoders, tokens)
        for name, weights in (("hidden_state1", "weights"), ("hidden_state2", "weights2")):
            if name in states:
                states[name] = joined_rows(states[name], tokens.get(weights))
        return states

    def encode_prompts(self, encoders: Sequence[nn.Module | None], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The same with [B, 77 * rows, D]; brackets are weights, and all prompts get as many rows as the longest."""
        tokens = self._tokens(prompts, 1, ROWS_OF_A_PREVIEW, weighted=True)
        states = self._states(encoders, tokens)
        for name, weights in (("hidden_state1", "weights"), ("hidden_state2", "weights2")):
            if name in states:
                states[name] = weighted_prompt(states[name], tokens[weights])
        return states

    def text_encoder_id(self) -> str:
        """Hashes of weights of both encoders, the length of captions, and whether brackets in them are weights."""
        weighted = "-weighted" if self.weighted_captions else ""
        return f"{text_encoder_id(self.path)}-{self.caption_room}{weighted}"

    def condition(
        self, text: dict[str, Tensor], sizes: Tensor | None = None, lengths: tuple[int, ...] | None = None
    ) -> Condition:
        """Text and sizes as they are; sizes that nobody told, when memory is estimated, are 0."""
        if sizes is None:
            sizes = torch.zeros(len(text["pool2"]), 6, device=text["pool2"].device)
        return Condition(text, sizes)

    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Takes x [B, 4, h, w] and t [B] in 0..999 -> [B, 4, h, w]."""
        assert cond.sizes is not None, "sizes are an input of this model"
        context = torch.cat([cond.text["hidden_state1"], cond.text["hidden_state2"]], dim=-1).to(x.dtype)
        vector = torch.cat([cond.text["pool2"].to(x.dtype), size_embedding(cond.sizes).to(x.dtype)], dim=-1)
        answer: Tensor = denoiser(x, t, context, vector)
        return answer

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks on the way down, the middle one, and those on the way up."""
        return cast(SdxlUNet, denoiser).blocks()

    def encoder_blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The layers of either encoder."""
        text_model = encoder.text_model if isinstance(encoder, PooledTextEncoder) else encoder
        return list(cast(TextEncoder, text_model).encoder.layers)

    def network_views(self, text_encoders: Sequence[nn.Module]) -> list[nn.Module]:
        """Each encoder under the name `text_model`, which published LoRA keys hold."""
        views: list[nn.Module] = []
        for encoder in text_encoders:
            text_model = encoder.text_model if isinstance(encoder, PooledTextEncoder) else encoder
            absent = isinstance(encoder, AbsentEncoder)
            views.append(encoder if absent else nn.ModuleDict({"text_model": cast(nn.Module, text_model)}))
        return views

    def base_model_version(self) -> str:
        """sdxl_base_v1-0, for every model of the family."""
        return "sdxl_base_v1-0"

    def model_spec(self) -> dict[str, str]:
        """The modelspec fields of the family."""
        return {
            "architecture": "stable-diffusion-xl-v1-base",
            "implementation": "https://github.com/Stability-AI/generative-models",
            "resolution": "1024x1024",
            "prediction_type": "v" if self.model.v_parameterization else "epsilon",
        }

    def _tokens(self, texts: Sequence[str], min_rows: int, max_rows: int, weighted: bool) -> dict[str, Tensor]:
        """Rows of ids for both encoders, and their weights if there are any."""
        tokens: dict[str, Tensor] = {}
        for end, tokenizer in zip(("", "2"), self.tokenizers, strict=True):
            rows = tokenize_rows(tokenizer, texts, max_rows=max_rows, min_rows=min_rows, weighted=weighted)
            tokens |= {f"input_ids{end}": rows.ids} | ({f"weights{end}": rows.weights} if weighted else {})
        return tokens

    def _states(self, encoders: Sequence[nn.Module | None], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of states [B, rows, 77, D] before the last layer, and the pooled text of each first row [B, P]."""
        first, second = encoders if encoders else (None, None)
        found = {}
        if first is not None:
            ids = _on_device_of(first, tokens["input_ids"])
            (states,) = cast(TextEncoder, first).states(ids.flatten(0, 1), 2)
            found["hidden_state1"] = states.unflatten(0, ids.shape[:2])
        if second is not None:
            ids = _on_device_of(second, tokens["input_ids2"])
            states, pooled = second(ids.flatten(0, 1))
            found["hidden_state2"] = states.unflatten(0, ids.shape[:2])
            found["pool2"] = pooled.unflatten(0, ids.shape[:2])[:, 0]
        return found


def size_embedding(sizes: Tensor) -> Tensor:
    """Sizes [B, 6] -> sinusoids float32 [B, 6 * 256], each number by itself."""
    return timestep_embedding(sizes.flatten(), NUMBER_DIM).unflatten(0, sizes.shape).flatten(1)


def _on_device_of(encoder: nn.Module, ids: Tensor) -> Tensor:
    return ids.to(next(encoder.parameters()).device, non_blocking=True)
