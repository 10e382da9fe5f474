"""diffusers reads our LoRA file for SDXL as we do, in the U-Net and in both text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from demo_sdxl_folder import SdxlDemo
from library.diffusion.guidance import guided
from library.files.unet_names import names_by_level
from library.files.weights import open_weights
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.architecture import Condition
from library.models.sdxl.architecture import Sdxl
from networks.lora import create_network_from_weights
from tests.clients.sdxl_training import train_sdxl

CPU = torch.device("cpu")
PROMPTS = ["one white star", "a square"]
SIDE = 64
CLOSE = {"atol": 1e-4, "rtol": 0.0}


class Both:
    """The small model as we have it and as a pipeline of diffusers, and the same questions to each."""

    def __init__(self, demo: SdxlDemo) -> None:
        flags = ModelFlags(pretrained_model_name_or_path=str(demo.checkpoint), tokenizer_cache_dir=str(demo.tokenizers))
        self.arch = Sdxl(Settings.of(flags))
        self.encoders = self.arch.load_text_encoders(torch.float32, CPU)
        self.unet: Any = self.arch.load_denoiser(torch.float32, CPU)
        vae: Any = self.arch.load_vae(torch.float32, CPU)
        tokenizers = self.arch.tokenizers
        self.pipeline: Any = StableDiffusionXLPipeline(
            vae,
            *their_encoders(self.encoders, tokenizers[1].eos_token_id),
            *tokenizers,
            their_unet(self.unet),
            scheduler(),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.start = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def our_text(self) -> dict[str, Tensor]:
        return self.arch.encode_text(self.encoders, self.arch.tokenize(PROMPTS))

    @torch.no_grad()
    def their_text(self) -> dict[str, Tensor]:
        states, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            PROMPTS[0], negative_prompt=PROMPTS[1], device=CPU
        )
        both, width = torch.cat([states, negative]), self.our_text()["hidden_state1"].shape[-1]
        return {
            "hidden_state1": both[..., :width],
            "hidden_state2": both[..., width:],
            "pool2": torch.cat([pooled, negative_pooled]),
        }

    @torch.no_grad()
    def our_latents(self) -> Tensor:
        """Four steps of DDIM with guidance 4."""
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
        condition, steps = Condition(self.our_text(), sizes), scheduler()
        steps.set_timesteps(4)
        x = self.start.clone()
        for t in steps.timesteps:
            both = self.arch.predict(self.unet, torch.cat([x, x]), t.repeat(2), condition)
            x = steps.step(guided(both[:1], both[1:], 4.0), t, x).prev_sample
        return x

    def their_latents(self) -> Tensor:
        latents: Tensor = self.pipeline(
            PROMPTS[0],
            negative_prompt=PROMPTS[1],
            height=SIDE,
            width=SIDE,
            latents=self.start.clone(),
            num_inference_steps=4,
            guidance_scale=4.0,
            output_type="latent",
        ).images
        return latents


def their_unet(ours: Any) -> UNet2DConditionModel:
    shape = ours.shape
    theirs: Any = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=shape.widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=shape.layers_per_level,
        transformer_layers_per_block=[max(1, depth) for depth in shape.depths],
        attention_head_dim=[max(1, width // 64) for width in shape.widths],
        cross_attention_dim=shape.context_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=shape.vector_dim,
    )
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights[row] for row, name in names_by_level(weights).items()})
    return theirs.eval()


def their_encoders(ours: list[Any], end_token: int) -> tuple[nn.Module, nn.Module]:
    first, second = ours
    clip = CLIPTextModel(first.config)
    clip.load_state_dict(first.state_dict())
    config = second.text_model.config
    config.projection_dim, config.eos_token_id = second.text_projection.shape[1], end_token
    bigg = CLIPTextModelWithProjection(config)
    weights = {f"text_model.{name}": value for name, value in second.text_model.state_dict().items()}
    bigg.load_state_dict(weights | {"text_projection.weight": second.text_projection.T})
    return clip.eval(), bigg.eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@pytest.fixture(scope="module")
def lora(small_sdxl: SdxlDemo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with convolutions that training has moved far enough to be seen."""
    output = tmp_path_factory.mktemp("diffusers_sdxl")
    train_sdxl(small_sdxl, output, "--learning_rate", "2e-2", "--network_args", "conv_dim=2", "conv_alpha=2")
    return output / "small.safetensors"


def test_diffusers_draws_the_same_picture_with_our_lora_and_uses_every_key_of_it(
    small_sdxl: SdxlDemo, lora: Path
) -> None:
    both = Both(small_sdxl)
    plain = both.their_latents()
    torch.testing.assert_close(both.our_latents(), plain, **CLOSE)
    plain_text = both.our_text()

    both.pipeline.load_lora_weights(str(lora))
    encoders = both.arch.network_views(both.encoders)
    network, weights = create_network_from_weights(1.0, str(lora), None, encoders, both.unet)
    network.apply_to(encoders, both.unet)
    network.load_state_dict(dict(weights), strict=True)
    ours, theirs = both.our_text(), both.their_text()
    for name, value in ours.items():
        assert (value - plain_text[name]).abs().max() > 0.01, f"{name}: the LoRA must be seen"
        torch.testing.assert_close(value, theirs[name], **CLOSE)
    with_lora = both.their_latents()
    assert (with_lora - plain).abs().max() > 0.05, "the LoRA must be seen, or its agreement says nothing"
    torch.testing.assert_close(both.our_latents(), with_lora, **CLOSE)

    parts = {
        "lora_unet_": both.pipeline.unet,
        "lora_te1_": both.pipeline.text_encoder,
        "lora_te2_": both.pipeline.text_encoder_2,
    }
    with open_weights(lora) as file:
        downs = [key for key in file.keys() if key.endswith("lora_down.weight")]
    for prefix, part in parts.items():
        used = sum(".lora_A." in f".{name}." for name, _ in part.named_parameters())
        assert used == sum(key.startswith(prefix) for key in downs) > 0, prefix
