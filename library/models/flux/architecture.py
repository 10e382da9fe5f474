"""FLUX.1 and Chroma, as the trainer, the caches and the previews see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.diffusion.flow import FlowMatching
from library.files.formats import TextFormat
from library.flags.flow import FlowFlags, WeightingFlags
from library.flags.model import ModelFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.run import AttentionFlags, PrecisionFlags
from library.flags.settings import Settings
from library.models.architecture import (
    Architecture,
    Condition,
    Generators,
    ImageRequest,
    OnWeight,
    QuantizedLayers,
    SwapGroup,
    TokenCount,
    double_and_single_swap_groups,
)
from library.models.attention import attention_mode
from library.models.control_image import CONTROL_IMAGE, read_control
from library.models.flux.checkpoint import load_controlnet, load_transformer, locate, read_variant
from library.models.flux.controlnet import FluxControlNet
from library.models.flux.flags import FluxModelFlags, FluxTrainingFlags
from library.models.flux.model import TIME_FACTOR, StreamTransformer
from library.models.flux.patches import pack, unpack
from library.models.flux.sampling import SMALLEST, completed, denoised, packed_noise
from library.models.flux.stream import Modulation
from library.models.flux.text import CLIP_TOKENS, NoTextEncoder, clip_id, load_clip, load_t5, pooled_state, t5_id
from library.models.flux.variants import Variant
from library.models.parts import MODEL_FLAG
from library.models.text.clip import TextEncoder, check_vocabulary
from library.models.text.t5 import T5_KIND, T5_TOKENIZER, T5Encoder, check_t5_vocabulary, tokenize_padded
from library.models.text.tokens import V1_TOKENIZER, count_tokens, load_tokenizer, row_lengths, tokenize_rows
from library.models.vae import flux as autoencoder

MASK = "t5_attn_mask"
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Flux(Architecture):
    """A transformer of two streams, CLIP-L and T5-XXL, sixteen latent channels; predicts the velocity.

    Chroma differs by data: its file has no layers for the pooled text, so no CLIP-L is read.
    """

    name: ClassVar[str] = "flux"
    bucket_multiple: ClassVar[int] = 32
    encoder_prefixes: ClassVar[tuple[str, ...]] = ("lora_te1", "lora_te3")
    trained_beside_cache: ClassVar[frozenset[int]] = frozenset({0})  # CLIP-L, which is small
    picture_options: ClassVar[frozenset[str]] = frozenset({"guidance_scale", "flow_shift", CONTROL_IMAGE})
    latents = autoencoder.latent_format("_flux.npz")
    # T5's feed-forward brings its numbers to the format of its last weight, float8 included.
    quantized_in_encoders = QuantizedLayers(("",), ("DenseReluDense.wo",))
    quantized: ClassVar[QuantizedLayers | None] = QuantizedLayers(("double_blocks", "single_blocks"), ("norm",))

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.model = settings[ModelFlags]
        self.flags = settings[FluxModelFlags]
        self.masks_text = self.flags.apply_t5_attn_mask
        self.process = FlowMatching(
            settings[NoiseFlags],
            settings[LossFlags],
            settings[FlowFlags],
            settings[WeightingFlags],
            _DTYPES[settings[PrecisionFlags].mixed_precision],
        )
        self.text = TextFormat(
            suffix="_flux_te.npz",
            arrays=("l_pooled", "t5_out", "txt_ids", MASK),
            must_match={"apply_t5_attn_mask": self.masks_text},
            mask=MASK if self.masks_text else "",
            token_groups=(("t5_out", "txt_ids", MASK),),
        )
        self.controlnet: FluxControlNet | None = None

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        """CLIP-L, or what stands in its place, and T5-XXL."""
        return [self.load_text_encoder(number, dtype, device) for number in range(2)]

    def load_text_encoder(self, number: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """CLIP-L, or what stands in its place, for 0, and T5-XXL for 1; the other is not read."""
        if number == 1:
            t5 = load_t5(self._t5_path, dtype, device)
            check_t5_vocabulary(t5, self.t5_tokenizer, str(self._t5_path))
            return t5
        if not self.variant.takes_pooled:
            return NoTextEncoder()
        clip = load_clip(self._clip_path, dtype, device)
        check_vocabulary(clip, self.clip_tokenizer, str(self._clip_path))
        return clip

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The autoencoder of --ae."""
        return autoencoder.load_ae(self._ae_path, "--ae", dtype, device)

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        """The transformer, with the attention that the flags ask for."""
        mode = attention_mode(self.settings[AttentionFlags])
        return load_transformer(self._path, self.flags.model_type, dtype, device, mode, on_weight)

    def load_controlnet(self, dtype: torch.dtype, device: torch.device) -> None:
        """Read the ControlNet of --controlnet_model_name_or_path; pictures with a control are then steered by it."""
        path = self._given(self.flags.controlnet_model_name_or_path, "--controlnet_model_name_or_path")
        self.controlnet = load_controlnet(path, dtype, device, attention_mode(self.settings[AttentionFlags]))

    @cached_property
    def variant(self) -> Variant:
        """Which published model the file holds: dev, schnell or Chroma."""
        return read_variant(self._path, self.flags.model_type)

    @cached_property
    def clip_tokenizer(self) -> Any:
        """The tokenizer of CLIP-L."""
        return load_tokenizer(*V1_TOKENIZER, self.model.tokenizer_cache_dir, self._folder)

    @cached_property
    def t5_tokenizer(self) -> Any:
        """The tokenizer of T5-XXL."""
        return load_tokenizer(T5_TOKENIZER, "", self.model.tokenizer_cache_dir, self._folder, T5_KIND)

    @property
    def t5_length(self) -> int:
        """Tokens that T5 reads of every caption, the end mark included."""
        return self.flags.t5xxl_max_token_length or self.variant.text_tokens

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`l_tokens` int64 [B, 77]; `t5_tokens` and `t5_attn_mask` int64 [B, T]."""
        if self.variant.takes_pooled:
            clip_tokens = tokenize_rows(self.clip_tokenizer, captions, max_rows=1).ids[:, 0]
        else:
            clip_tokens = torch.zeros(len(captions), CLIP_TOKENS, dtype=torch.int64)
        t5_tokens, mask = tokenize_padded(self.t5_tokenizer, captions, self.t5_length)
        return {"l_tokens": clip_tokens, "t5_tokens": t5_tokens, MASK: mask}

    def token_counts(self, caption: str) -> list[TokenCount]:
        """Of CLIP-L, where there is one, and of T5."""
        rooms = [(self.t5_tokenizer, self.t5_length - 1)]  # one place is for the end mark
        if self.variant.takes_pooled:
            rooms.insert(0, (self.clip_tokenizer, CLIP_TOKENS - 2))
        counts = [(room, *count_tokens(tokenizer, caption, room)) for tokenizer, room in rooms]
        return [TokenCount(tokens, room, cut) for room, tokens, cut in counts]

    def encode_text(self, encoders: Sequence[nn.Module | None], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """`l_pooled` [B, P], `t5_out` [B, T, D], `txt_ids` [B, T, 3], which are 0, and `t5_attn_mask` [B, T].

        With --apply_t5_attn_mask the states that nothing attends to are 0, so that caches need not hold them.
        """
        clip, t5 = encoders if encoders else (None, None)
        encoded = {}
        if clip is not None:
            ids = _on_device_of(clip, tokens["l_tokens"])
            states = clip(ids)
            encoded["l_pooled"] = pooled_state(states, ids) if isinstance(clip, TextEncoder) else states
        if t5 is not None:
            ids, mask = _on_device_of(t5, tokens["t5_tokens"]), _on_device_of(t5, tokens[MASK])
            states = t5(ids, mask if self.masks_text else None)
            if self.masks_text:
                counted = F.pad(mask, (1, -1), value=1) if self.variant.extra_text_token else mask
                states = states * counted.to(states.dtype)[..., None]
            encoded |= {"t5_out": states, "txt_ids": torch.zeros(*ids.shape, 3, device=ids.device), MASK: mask}
        return encoded

    def text_encoder_id(self) -> str:
        """Hashes of weights of the encoders, and the length of captions."""
        ids = [t5_id(self._t5_path), str(self.t5_length)]
        if self.variant.takes_pooled:
            ids.insert(0, clip_id(self._clip_path))
        return "-".join(ids)

    def encode_image(self, vae: nn.Module, pixels: Tensor, generator: Generators = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 16, H/8, W/8] of unit variance, drawn from the posterior."""
        return autoencoder.encode(vae, pixels, generator)

    def vae_id(self) -> str:
        """A hash of weights of the encoder half, the same for every layout of the file."""
        return self._vae_id

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """[B, 16, h, w] of unit variance -> [B, 3, 8h, 8w] in [-1, 1]."""
        return autoencoder.decode(vae, latents)

    def condition(
        self, text: dict[str, Tensor], sizes: Tensor | None = None, lengths: tuple[int, ...] | None = None
    ) -> Condition:
        """The guidance of --guidance_scale for every row and, where the mask counts, how much text is looked at."""
        states = text["t5_out"]
        if not self.masks_text:
            lengths = None
        elif lengths is None:
            lengths = row_lengths(text[MASK])
        if lengths is not None:
            extra = int(self.variant.extra_text_token)
            lengths = tuple(min(length + extra, states.shape[1]) for length in lengths)
        scale = self.settings[FluxTrainingFlags].guidance_scale
        guidance = torch.full((len(states),), scale, dtype=torch.float32, device=states.device)
        return Condition(text, guidance=guidance, lengths=lengths)

    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Takes x [B, 16, h, w] with even sides and t [B] in 0..1000 -> the velocity [B, 16, h, w]."""
        dtype = denoiser.get_parameter("img_in.bias").dtype  # weights may be in float8, biases never are
        size = (x.shape[-2] // 2, x.shape[-1] // 2)
        img, txt, pooled = pack(x).to(dtype), cond.text["t5_out"].to(dtype), cond.text["l_pooled"].to(dtype)
        told = (txt, t.float() / TIME_FACTOR, cond.guidance, pooled, size, cond.lengths)
        residuals: list[Tensor] = []
        if self.controlnet is not None and cond.control is not None:
            residuals = self.controlnet(img, cond.control.to(dtype), *told)
        return unpack(denoiser(img, *told, residuals), size)

    def sample(self, denoiser: nn.Module, cond: Condition, uncond: Condition | None, request: ImageRequest) -> Tensor:
        """Latents [1, 16, h, w] of unit variance, steered by the `controlnet_image` of the request's extras."""
        assert request.width and request.height and request.seed is not None, "a complete request"
        noise = packed_noise(request.seed, request.height, request.width, self.latents.channels)
        device = cond.text["t5_out"].device
        predict = partial(self.predict, denoiser)
        if CONTROL_IMAGE not in request.extras:
            return denoised(predict, noise.to(device), cond, uncond, request)
        control = read_control(Path(request.extras[CONTROL_IMAGE]), request.height, request.width).to(device)
        told = [None if one is None else replace(one, control=control) for one in (cond, uncond)]
        with self._controlnet_at_work(denoiser):
            return denoised(predict, noise.to(device), cast(Condition, told[0]), told[1], request)

    def complete_request(self, request: ImageRequest) -> ImageRequest:
        """512x512, 20 steps, guidance 3.5 where `request` says nothing; sides floored to 16.

        Raises ValueError for a picture to follow without a ControlNet, and for one that cannot be read.
        """
        complete = completed(request)
        if CONTROL_IMAGE in request.extras:
            if not self.flags.controlnet_model_name_or_path:
                raise ValueError("a picture to follow (--cn) needs a ControlNet: --controlnet_model_name_or_path")
            read_control(Path(request.extras[CONTROL_IMAGE]), SMALLEST, SMALLEST)
        return complete

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The double blocks, then the single ones."""
        model = cast(StreamTransformer, denoiser)
        return [*model.double_blocks, *model.single_blocks]

    def encoder_blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The layers of CLIP-L or T5."""
        if isinstance(encoder, T5Encoder):
            return list(encoder.encoder.block)
        return list(encoder.encoder.layers) if isinstance(encoder, TextEncoder) else []

    def swap_groups(self, denoiser: nn.Module, blocks_to_swap: int) -> list[SwapGroup]:
        """Half of `blocks_to_swap` from the double blocks, and two single blocks for each of the rest."""
        model = cast(StreamTransformer, denoiser)
        return double_and_single_swap_groups(model.double_blocks, model.single_blocks, blocks_to_swap)

    def vector_layers(self, denoiser: nn.Module) -> list[nn.Linear]:
        """What makes the modulations of FLUX.1, a quarter of its weights; Chroma has no such layers."""
        blocks = self.blocks(denoiser)
        return [part.lin for block in blocks for part in block.children() if isinstance(part, Modulation)]

    def network_views(self, text_encoders: Sequence[nn.Module]) -> list[nn.Module]:
        """CLIP-L under the name `text_model`, which published LoRA keys hold; T5 as it is."""
        return [
            nn.ModuleDict({"text_model": encoder}) if isinstance(encoder, TextEncoder) else encoder
            for encoder in text_encoders
        ]

    def base_model_version(self) -> str:
        """flux1 or chroma."""
        return self.variant.base_version

    def metadata(self) -> dict[str, str]:
        """How the text is masked and at which noise levels the model learns."""
        flow, weighting = self.settings[FlowFlags], self.settings[WeightingFlags]
        return {
            "ss_model_type": self.flags.model_type,
            "ss_apply_t5_attn_mask": str(self.masks_text),
            "ss_weighting_scheme": weighting.weighting_scheme,
            "ss_logit_mean": str(weighting.logit_mean),
            "ss_logit_std": str(weighting.logit_std),
            "ss_mode_scale": str(weighting.mode_scale),
            "ss_guidance_scale": str(self.settings[FluxTrainingFlags].guidance_scale),
            "ss_timestep_sampling": flow.timestep_sampling,
            "ss_sigmoid_scale": str(flow.sigmoid_scale),
            "ss_model_prediction_type": flow.model_prediction_type,
            "ss_discrete_flow_shift": str(flow.discrete_flow_shift),
        }

    def model_spec(self) -> dict[str, str]:
        """The modelspec fields that follow from the model."""
        return {
            "architecture": self.variant.spec_architecture,
            "implementation": self.variant.implementation,
            "resolution": "1024x1024",
        }

    def unused_flags(self) -> Mapping[str, str]:
        """Guidance is no input of schnell; the blocks of Chroma have no modulation of their own."""
        unused = {}
        if self.variant.ignores_guidance:
            unused["guidance_scale"] = f"{self.variant.title} takes no guidance"
        if not self.variant.takes_pooled:
            unused["cpu_modulation"] = f"the blocks of {self.variant.title} have no layers that make modulations"
        return unused

    @contextmanager
    def _controlnet_at_work(self, denoiser: nn.Module) -> Iterator[None]:
        """The ControlNet beside the denoiser; between pictures it lies in main memory."""
        weight = denoiser.get_parameter("img_in.weight")
        if self.controlnet is None:
            self.load_controlnet(weight.dtype if weight.itemsize > 1 else torch.bfloat16, weight.device)
        assert self.controlnet is not None
        try:
            self.controlnet.to(weight.device)
            yield
        finally:
            self.controlnet.to("cpu")

    @cached_property
    def _path(self) -> Path:
        if not self.model.pretrained_model_name_or_path:
            raise ValueError(f"{MODEL_FLAG} is needed: a .safetensors file, a diffusers folder or a hub id")
        return locate(self.model.pretrained_model_name_or_path, MODEL_FLAG)

    @property
    def _folder(self) -> Path | None:
        """The model's folder, if it is one; it may hold tokenizers."""
        return self._path if self._path.is_dir() else None

    @property
    def _clip_path(self) -> Path:
        return self._given(self.flags.clip_l, "--clip_l")

    @property
    def _t5_path(self) -> Path:
        return self._given(self.flags.t5xxl, "--t5xxl")

    @property
    def _ae_path(self) -> Path:
        return self._given(self.flags.ae, "--ae")

    @cached_property
    def _vae_id(self) -> str:
        return autoencoder.ae_id(self._ae_path, "--ae")

    def _given(self, value: str | None, flag: str) -> Path:
        if not value:
            raise ValueError(
                f"{flag} is missing: {self.variant.title} needs it, a .safetensors file or a folder of diffusers"
            )
        return Path(value)


def _on_device_of(encoder: nn.Module, values: Tensor) -> Tensor:
    """`values` where the encoder's weights are; as they are for one without weights."""
    weight = next(encoder.parameters(), None)
    return values if weight is None else values.to(weight.device, non_blocking=True)
