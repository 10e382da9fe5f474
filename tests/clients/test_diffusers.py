"""diffusers reads our LoRA file as we do."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from library.diffusion.guidance import guided
from library.files.weights import open_weights
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.architecture import Condition
from library.models.sd.architecture import StableDiffusion
from networks.lora import create_network_from_weights
from tests.clients.training import train

CPU = torch.device("cpu")
PROMPTS = ["one white star", "a square"]


@pytest.fixture(scope="module")
def ours(small_sd):
    """Our own models of the small checkpoint: architecture, text encoder, U-Net, VAE."""
    flags = ModelFlags(
        pretrained_model_name_or_path=str(small_sd.checkpoint), tokenizer_cache_dir=str(small_sd.tokenizers)
    )
    arch = StableDiffusion(Settings.of(flags))
    encoder = arch.load_text_encoders(torch.float32, CPU)[0]
    return arch, encoder, arch.load_denoiser(torch.float32, CPU), arch.load_vae(torch.float32, CPU)


@pytest.fixture(scope="module")
def lora(small_sd, tmp_path_factory):
    """A LoRA with convolutions that training has moved far enough to be seen."""
    output = tmp_path_factory.mktemp("diffusers_client")
    train(small_sd, output, "--learning_rate", "1e-2", "--network_args", "conv_dim=2", "conv_alpha=1")
    return output / "small.safetensors"


def pipeline_of(ours, small_sd):
    """The same models as classes of diffusers and transformers."""
    _, encoder, unet, vae = ours
    shape = unet.shape
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    theirs = UNet2DConditionModel(
        block_out_channels=shape.widths,
        attention_head_dim=list(shape.num_heads),
        cross_attention_dim=shape.context_dim,
        layers_per_block=shape.layers_per_level,
        down_block_types=down,
        up_block_types=up,
        sample_size=16,
    )
    theirs.load_state_dict(unet.state_dict())
    text_model = CLIPTextModel(encoder.config)
    text_model.load_state_dict(encoder.state_dict())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(next(small_sd.tokenizers.iterdir())),
        unet=theirs.eval(),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def our_latents(ours, start):
    """What our U-Net and text encoder make of `start` in four steps of DDIM with guidance 4."""
    arch, encoder, unet, _ = ours
    text = arch.encode_text([encoder], arch.tokenize([PROMPTS[0], PROMPTS[1]]))
    scheduler = ddim()
    scheduler.set_timesteps(4)
    x = start.clone()
    for t in scheduler.timesteps:
        both = arch.predict(unet, torch.cat([x, x]), t.repeat(2), Condition(text))
        x = scheduler.step(guided(both[:1], both[1:], 4.0), t, x).prev_sample
    return x


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def test_diffusers_draws_the_same_picture_with_our_lora(small_sd, ours, lora):
    pipeline = pipeline_of(ours, small_sd)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def their_latents():
        result = pipeline(
            PROMPTS[0],
            negative_prompt=PROMPTS[1],
            latents=start.clone(),
            num_inference_steps=4,
            guidance_scale=4.0,
            output_type="latent",
        )
        return result.images

    plain = their_latents()
    torch.testing.assert_close(our_latents(ours, start), plain, atol=1e-4, rtol=0)

    pipeline.load_lora_weights(str(lora))
    arch, encoder, unet, _ = ours
    network, weights = create_network_from_weights(1.0, str(lora), None, arch.network_views([encoder])[0], unet)
    network.apply_to(None, unet)
    network.load_state_dict(weights, strict=True)
    with_lora = their_latents()
    assert (with_lora - plain).abs().max() > 0.05, "the LoRA must be seen, or its agreement says nothing"
    torch.testing.assert_close(our_latents(ours, start), with_lora, atol=1e-4, rtol=0)
    with network.off():
        torch.testing.assert_close(our_latents(ours, start), plain, atol=1e-4, rtol=0)


def test_every_key_of_our_file_is_used_by_diffusers(small_sd, ours, lora):
    pipeline = pipeline_of(ours, small_sd)
    pipeline.load_lora_weights(str(lora))
    with open_weights(lora) as file:
        ours_by_part = {
            part: sum(key.startswith(part) and key.endswith("lora_down.weight") for key in file.keys())
            for part in ("lora_unet_", "lora_te_")
        }
    theirs = {
        "lora_unet_": sum(name.endswith("lora_A.default_0") for name, _ in pipeline.unet.named_modules()),
        "lora_te_": sum(name.endswith("lora_A.default_0") for name, _ in pipeline.text_encoder.named_modules()),
    }
    assert theirs == ours_by_part
    assert ours_by_part["lora_unet_"] > 192 and ours_by_part["lora_te_"] == 12
