"""Small models of this family with random weights, under their published names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from demo_tokenizer import write_tokenizer
from library.files.weights import save_safetensors
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.controlnet import FluxControlNet
from library.models.flux.flags import FluxModelFlags, FluxTrainingFlags
from library.models.flux.model import FluxShape, FluxTransformer

SIZES = {"in_channels": 64, "width": 64, "num_heads": 2, "mlp_width": 256, "text_dim": 32}
DEV = FluxShape(**SIZES, double_blocks=2, single_blocks=3, pooled_dim=16, has_guidance=True)
SCHNELL = FluxShape(**SIZES, double_blocks=2, single_blocks=3, pooled_dim=16)
CHROMA = FluxShape(**SIZES, double_blocks=2, single_blocks=3, guidance_in_dim=16, guidance_width=24, guidance_depth=2)


def transformer(shape: FluxShape, seed: int = 0) -> FluxTransformer | ChromaTransformer:
    """A model with random weights, small enough that answers stay near one."""
    model = ChromaTransformer(shape) if shape.guidance_depth else FluxTransformer(shape)
    return with_random_weights(model, seed)


def controlnet(shape: FluxShape = DEV, seed: int = 0) -> FluxControlNet:
    return with_random_weights(FluxControlNet(shape), seed)


def with_random_weights(model, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.dim() == 1 and parameter.numel() in (32, 24):
                parameter.add_(1)  # the scales of norms
    return model.eval().requires_grad_(False)


def write(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, prefix: str = "") -> Path:
    save_safetensors({prefix + name: value.to(dtype) for name, value in model.state_dict().items()}, path)
    return path


def inputs(shape: FluxShape, rows: int = 2, size: tuple[int, int] = (2, 3), tokens: int = 5) -> dict[str, Tensor]:
    """Arguments of the transformer's forward for `rows` pictures."""
    generator = torch.Generator().manual_seed(1)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator)

    return {
        "img": normal(rows, size[0] * size[1], 64),
        "txt": normal(rows, tokens, shape.text_dim),
        "t": torch.rand(rows, generator=generator),
        "guidance": torch.full((rows,), 3.5),
        "pooled": normal(rows, shape.pooled_dim or 1),
        "size": size,
    }


def write_clip(path: Path, vocabulary: int) -> Path:
    """A CLIP-L of two layers whose pooled state has the width that `DEV` takes."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    model = with_random_weights(CLIPTextModel(config), 5)
    return write(model, path, prefix="" if hasattr(model, "text_model") else "text_model.")


def write_t5(path: Path, vocabulary: int, dtype: torch.dtype = torch.float32) -> Path:
    """A T5 of two layers whose states have the width that the small transformers take."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    model = with_random_weights(T5EncoderModel(config), 6)
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    save_safetensors(weights, path)
    return path


def write_ae(path: Path) -> Path:
    """An autoencoder with the published number of levels and channels of latents, in the layout of diffusers."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return write(with_random_weights(model, 7), path)


WORDS = ["a", "red", "house", "on", "the", "hill", "cat", "of", "stone"]


def write_tokenizers(folder: Path) -> tuple[int, int]:
    """Tokenizers as --tokenizer_cache_dir holds them; the sizes of their vocabularies, CLIP's and T5's."""
    clip = write_tokenizer(folder / "openai_clip-vit-large-patch14", WORDS)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.save_pretrained(folder / "google_t5-v1_1-xxl")
    return clip, len(tokenizer)


def settings(folder: Path, shape: FluxShape = DEV, **given: Any) -> Settings:
    """Settings of a whole small model, written to `folder`; `given` are flags of FLUX."""
    clip, t5 = write_tokenizers(folder / "tokenizers")
    write(transformer(shape), folder / "model.safetensors")
    flags: dict[str, Any] = {
        "model_type": "chroma" if shape.guidance_depth else "flux",
        "clip_l": None if shape.guidance_depth else str(write_clip(folder / "clip_l.safetensors", clip)),
        "t5xxl": str(write_t5(folder / "t5xxl.safetensors", t5)),
        "ae": str(write_ae(folder / "ae.safetensors")),
        "apply_t5_attn_mask": bool(shape.guidance_depth),
        "t5xxl_max_token_length": 8,
    }
    model = ModelFlags(
        pretrained_model_name_or_path=str(folder / "model.safetensors"), tokenizer_cache_dir=str(folder / "tokenizers")
    )
    guidance = 0.0 if shape.guidance_depth else 3.5
    return Settings.of(model, FluxModelFlags(**flags | given), FluxTrainingFlags(guidance_scale=guidance))
