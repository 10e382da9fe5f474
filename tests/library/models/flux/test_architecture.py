from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.files.weights import open_weights, save_safetensors
from library.flags.flow import FlowFlags
from library.flags.model import ModelFlags
from library.flags.run import PrecisionFlags
from library.flags.settings import Settings
from library.models.architecture import ImageRequest
from library.models.flux.architecture import Flux
from library.models.flux.flags import FluxModelFlags
from library.models.flux.model import FluxTransformer
from library.models.text.clip import TextEncoder
from library.models.text.t5 import T5Encoder, tokenize_padded
from tests.library.models.flux import small

FACTS = Path(__file__).resolve().parents[3] / "facts"
CPU = torch.device("cpu")
SHAPES = pytest.mark.parametrize("shape", [small.DEV, small.SCHNELL, small.CHROMA], ids=["dev", "schnell", "chroma"])
CAPTIONS = ["a red house on the hill", "cat"]


def flux(folder: Path, shape: Any = small.DEV, **given: Any) -> Flux:
    return Flux(small.settings(folder, shape, **given))


@SHAPES
def test_a_caption_becomes_an_answer(tmp_path: Path, shape: Any) -> None:
    arch = flux(tmp_path, shape)
    encoders, denoiser = arch.load_text_encoders(torch.float32, CPU), arch.load_denoiser(torch.float32, CPU)
    text = arch.encode_text(encoders, arch.tokenize(CAPTIONS))
    assert tuple(text) == arch.text.arrays
    pooled = (2, 77, 1) if shape.guidance_depth else (2, 16)
    assert [tuple(value.shape) for value in text.values()] == [pooled, (2, 8, 32), (2, 8, 3), (2, 8)]
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([100.0, 900.0])
    cond = arch.condition(text)
    both = arch.predict(denoiser, x, t, cond)
    assert both.shape == x.shape and both.isfinite().all()
    for row in range(2):
        alone = arch.predict(denoiser, x[[row]], t[[row]], cond.rows([row]))
        torch.testing.assert_close(both[[row]], alone, atol=2e-5, rtol=1e-4)


def test_time_is_divided_by_a_thousand_and_guidance_reaches_the_model(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    seen: list[Any] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_in = torch.nn.Linear(64, 8)

        def forward(self, img: Tensor, *told: Any) -> Tensor:
            seen.extend([img, *told])
            return img

    text = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), arch.tokenize(CAPTIONS))
    x = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).view(2, 16, 4, 6)
    answer = arch.predict(Model(), x, torch.tensor([250.0, 1000.0]), arch.condition(text))
    assert torch.equal(answer, x), "what is packed is unpacked"
    img, _, t, guidance, _, size, lengths, residuals = seen
    assert img.shape == (2, 6, 64) and size == (2, 3) and lengths is None and residuals == []
    # The first token is the patch in the upper left corner, its channels first.
    assert img[0, 0, :5].tolist() == [0.0, 1.0, 6.0, 7.0, 24.0]
    assert t.tolist() == [0.25, 1.0] and guidance.tolist() == [3.5, 3.5]


@pytest.mark.parametrize("shape", [small.DEV, small.CHROMA], ids=["dev", "chroma"])
def test_masked_text_is_counted_in_numbers_of_python(tmp_path: Path, shape: Any) -> None:
    arch = flux(tmp_path, shape, apply_t5_attn_mask=True)
    tokens = arch.tokenize(CAPTIONS)
    assert tokens["t5_attn_mask"].sum(1).tolist() == [7, 2]
    text = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), tokens)
    extra = 1 if shape.guidance_depth else 0
    counted = (7 + extra, 2 + extra)
    assert arch.condition(text).lengths == counted
    assert arch.condition(text, lengths=(7, 2)).lengths == counted
    assert arch.condition(text, lengths=(8, 2)).lengths == (8, 2 + extra), "there are no more than 8"
    used = [int((row != 0).any(dim=-1).sum()) for row in text["t5_out"]]
    assert used == list(counted), "what nothing attends to is zero"
    assert arch.text.mask == "t5_attn_mask" and arch.text.must_match == {"apply_t5_attn_mask": True}


def test_without_the_flag_padding_is_attended_to(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    text = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), arch.tokenize(CAPTIONS))
    assert arch.condition(text).lengths is None and arch.condition(text, lengths=(7, 2)).lengths is None
    assert (text["t5_out"] != 0).all() and arch.text.mask == ""


def test_an_absent_encoder_leaves_its_arrays_out(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    clip, t5 = arch.load_text_encoders(torch.float32, CPU)
    tokens = arch.tokenize(CAPTIONS)
    assert set(arch.encode_text([clip, None], tokens)) == {"l_pooled"}
    assert set(arch.encode_text([None, t5], tokens)) == {"t5_out", "txt_ids", "t5_attn_mask"}
    assert arch.encode_text([], tokens) == {}


def test_chroma_reads_no_clip(tmp_path: Path) -> None:
    arch = flux(tmp_path, small.CHROMA)
    assert not (tmp_path / "clip_l.safetensors").exists()
    nothing, t5 = arch.load_text_encoders(torch.float32, CPU)
    assert list(nothing.parameters()) == [] and arch.encoder_blocks(nothing) == []
    assert len(arch.encoder_blocks(t5)) == 2
    assert arch.encoder_prefixes == ("lora_te1", "lora_te3")
    layers = arch.adaptable_layers(arch.load_denoiser(torch.float32, CPU), [nothing, t5])
    assert not any(name.startswith("lora_te1") for name in layers)
    assert "lora_te3_encoder_block_1_layer_0_SelfAttention_q" in layers


def test_layers_have_the_names_that_published_adapters_have(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    layers = arch.adaptable_layers(arch.load_denoiser(torch.float32, CPU), arch.load_text_encoders(torch.float32, CPU))
    assert layers["lora_unet_double_blocks_0_img_attn_qkv"] == (192, 64)
    assert layers["lora_unet_single_blocks_2_linear1"] == (192 + 256, 64)
    assert layers["lora_unet_double_blocks_1_txt_mod_lin"] == (384, 64)
    assert layers["lora_unet_double_blocks_1_img_mlp_2"] == (64, 256)
    assert layers["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] == (16, 16)
    assert layers["lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0"] == (48, 32)


def test_the_length_of_captions_follows_the_model(tmp_path: Path) -> None:
    lengths = {
        name: flux(tmp_path / name, shape, t5xxl_max_token_length=None).t5_length
        for name, shape in (("dev", small.DEV), ("schnell", small.SCHNELL), ("chroma", small.CHROMA))
        if not (tmp_path / name).mkdir()
    }
    assert lengths == {"dev": 512, "schnell": 256, "chroma": 512}


def test_long_captions_are_cut_and_said(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    clip, t5 = arch.token_counts("a red house on the hill of stone cat")
    assert (clip.tokens, clip.room, clip.cut) == (9, 75, "")
    assert (t5.tokens, t5.room, t5.cut) == (9, 7, "stone cat")
    ids, mask = tokenize_padded(arch.t5_tokenizer, ["a red house on the hill of stone cat"], 8)
    assert ids[0, -1] == 1 and mask.sum() == 8


def test_captions_are_cut_as_the_tokenizer_itself_cuts_them(tmp_path: Path) -> None:
    tokenizer = flux(tmp_path).t5_tokenizer
    captions = [*CAPTIONS, "", "a red house on the hill of stone cat"]
    ids, mask = tokenize_padded(tokenizer, captions, 8)
    theirs = tokenizer(captions, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    assert torch.equal(ids, theirs.input_ids) and torch.equal(mask, theirs.attention_mask)


def test_pixels_become_latents_and_pixels_again(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    vae = arch.load_vae(torch.float32, CPU)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = arch.encode_image(vae, pixels, torch.Generator().manual_seed(1))
    assert latents.shape == (2, 16, 4, 6) and torch.equal(arch.scale_latents(latents), latents)
    posterior = vae.encode(pixels).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(latents, (drawn - 0.1159) * 0.3611)
    torch.testing.assert_close(arch.decode_latents(vae, latents), vae.decode(drawn).sample, atol=1e-5, rtol=1e-4)


def test_a_picture_is_sampled_and_a_negative_prompt_changes_it(tmp_path: Path) -> None:
    arch = flux(tmp_path, small.CHROMA)
    denoiser = arch.load_denoiser(torch.float32, CPU)
    both = arch.condition(arch.encode_prompts(arch.load_text_encoders(torch.float32, CPU), ["a cat", "red stone"]))
    request = arch.complete_request(ImageRequest("a cat", width=70, height=64, steps=2, seed=3, guidance_scale=0.0))
    plain = arch.sample(denoiser, both.rows([0]), None, request)
    assert plain.shape == (1, 16, 8, 8)
    guided = arch.sample(denoiser, both.rows([0]), both.rows([1]), replace(request, scale=4.0))
    assert not torch.allclose(plain, guided)


def test_a_control_picture_steers_the_answer(tmp_path: Path) -> None:
    net = small.write(small.controlnet(), tmp_path / "net.safetensors")
    arch = flux(tmp_path, controlnet_model_name_or_path=str(net))
    denoiser = arch.load_denoiser(torch.float32, CPU)
    cond = arch.condition(arch.encode_prompts(arch.load_text_encoders(torch.float32, CPU), ["a cat"]))
    x, t = torch.randn(1, 16, 4, 4), torch.tensor([500.0])
    plain = arch.predict(denoiser, x, t, cond)
    arch.load_controlnet(torch.float32, CPU)
    assert torch.equal(arch.predict(denoiser, x, t, cond), plain), "no picture, no control"
    cond.control = torch.rand(1, 3, 32, 32) * 2 - 1
    assert not torch.allclose(arch.predict(denoiser, x, t, cond), plain)
    pair = cond.followed_by(cond)
    assert pair.control is not None and pair.control.shape[0] == 2 and pair.rows([1]).control is not None


@SHAPES
def test_a_text_encoder_is_read_by_itself_in_numbers_of_its_own(tmp_path: Path, shape: Any) -> None:
    arch = flux(tmp_path, shape)
    both = arch.load_text_encoders(torch.float32, CPU)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        alone = arch.load_text_encoder(number, dtype, CPU).state_dict()
        expected = {name: value.to(dtype) for name, value in both[number].state_dict().items()}
        assert alone.keys() == expected.keys() and all(torch.equal(alone[name], expected[name]) for name in alone)


def test_a_prompt_names_the_picture_that_the_controlnet_follows(tmp_path: Path) -> None:
    net = small.write(small.controlnet(), tmp_path / "net.safetensors")
    arch = flux(tmp_path, controlnet_model_name_or_path=str(net))
    denoiser = arch.load_denoiser(torch.float32, CPU)
    both = arch.condition(arch.encode_prompts(arch.load_text_encoders(torch.float32, CPU), ["a cat", "red stone"]))
    plain = arch.complete_request(ImageRequest("a cat", width=64, height=64, steps=1, seed=3, scale=2.0))

    def steered(colour: str) -> Tensor:
        Image.new("RGB", (20, 40), colour).save(tmp_path / "control.png")
        extras = {"controlnet_image": str(tmp_path / "control.png")}
        request = arch.complete_request(replace(plain, extras=extras))
        return arch.sample(denoiser, both.rows([0]), both.rows([1]), request)

    white, black = steered("white"), steered("black")
    assert not torch.allclose(white, black)
    assert torch.equal(white, steered("white"))
    assert not torch.allclose(arch.sample(denoiser, both.rows([0]), both.rows([1]), plain), white)


def test_a_picture_to_follow_needs_a_controlnet_and_must_be_there(tmp_path: Path) -> None:
    request = ImageRequest("a cat", extras={"controlnet_image": str(tmp_path / "nowhere.png")})
    with pytest.raises(ValueError, match="needs a ControlNet: --controlnet_model_name_or_path"):
        flux(tmp_path).complete_request(request)
    net = small.write(small.controlnet(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.png"):
        flux(tmp_path, controlnet_model_name_or_path=str(net)).complete_request(request)


@pytest.mark.parametrize(
    ("shape", "version", "spec"),
    [
        (small.DEV, "flux1", "flux-1-dev"),
        (small.SCHNELL, "flux1", "flux-1-schnell"),
        (small.CHROMA, "chroma", "chroma"),
    ],
)
def test_metadata_say_which_model_it_is(tmp_path: Path, shape: Any, version: str, spec: str) -> None:
    arch = flux(tmp_path, shape)
    assert arch.base_model_version() == version
    assert arch.model_spec()["architecture"] == spec and "prediction_type" not in arch.model_spec()
    chroma = bool(shape.guidance_depth)
    assert arch.metadata() == {
        "ss_model_type": "chroma" if chroma else "flux",
        "ss_apply_t5_attn_mask": str(chroma),
        "ss_weighting_scheme": "uniform",
        "ss_logit_mean": "0.0",
        "ss_logit_std": "1.0",
        "ss_mode_scale": "1.29",
        "ss_guidance_scale": "0.0" if chroma else "3.5",
        "ss_timestep_sampling": "sigma",
        "ss_sigmoid_scale": "1.0",
        "ss_model_prediction_type": "sigma_scaled",
        "ss_discrete_flow_shift": "3.0",
    }
    unused = {"flux-1-schnell": {"guidance_scale"}, "chroma": {"cpu_modulation"}}
    assert set(arch.unused_flags()) == unused.get(spec, set())


@pytest.mark.parametrize("shape", [small.DEV, small.SCHNELL, small.CHROMA], ids=["dev", "schnell", "chroma"])
def test_names_in_files_are_the_recorded_ones(tmp_path: Path, shape: Any, request: pytest.FixtureRequest) -> None:
    arch, kind = flux(tmp_path, shape), request.node.callspec.id
    training = json.loads((FACTS / "flux_training.json").read_text(encoding="utf-8"))
    caches = json.loads((FACTS / "cache_npz.json").read_text(encoding="utf-8"))
    assert arch.base_model_version() == training["base_model_version"]["chroma" if kind == "chroma" else "flux"]
    spec = training["modelspec"][kind]
    assert arch.model_spec()["architecture"] + "/lora" == spec["modelspec.architecture"]
    for field in ("implementation", "resolution"):
        assert arch.model_spec()[field] == spec[f"modelspec.{field}"]
    assert sorted(arch.metadata()) == sorted(training["extra_metadata_keys"])
    assert [*arch.text.arrays, *arch.text.must_match] == caches["text_encoder_keys"]["flux/chroma"]
    assert arch.text.suffix == caches["text_encoder_suffix"]["flux/chroma"]
    assert arch.latents.suffix == caches["latents_suffix"]["flux/chroma"]


def test_caches_know_what_they_were_made_with(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    first = arch.text_encoder_id()
    model = small.write_t5(tmp_path / "t5_fp16.safetensors", 12, torch.float16)
    half = Flux(changed(arch.settings, t5xxl=str(model)))
    assert half.text_encoder_id() == first, "the same weights in another number format"
    eighth = small.write_t5(tmp_path / "t5_fp8.safetensors", 12, torch.float8_e4m3fn)
    assert Flux(changed(arch.settings, t5xxl=str(eighth))).text_encoder_id() != first
    assert Flux(changed(arch.settings, t5xxl_max_token_length=16)).text_encoder_id() != first
    assert len(arch.vae_id()) == 16 and arch.vae_id() == half.vae_id()


def test_one_file_may_hold_all_parts(tmp_path: Path) -> None:
    arch = flux(tmp_path)
    whole: dict[str, Tensor] = {}
    prefixes = {
        "model": "model.diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
        "ae": "vae.",
    }
    for name, prefix in prefixes.items():
        with open_weights(tmp_path / f"{name}.safetensors") as file:
            whole |= {prefix + key: file.read(key) for key in file.keys()}
    path = tmp_path / "whole.safetensors"
    save_safetensors(whole, path)
    groups = dict(changed(arch.settings, clip_l=str(path), t5xxl=str(path), ae=str(path)).groups)
    groups[ModelFlags] = replace(groups[ModelFlags], pretrained_model_name_or_path=str(path))
    one = Flux(Settings.of(*groups.values()))
    assert one.text_encoder_id() == arch.text_encoder_id() and one.vae_id() == arch.vae_id()
    for first, second in zip(parts_of(arch), parts_of(one), strict=True):
        theirs = second.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("whole_pipeline", [True, False])
def test_parts_may_be_named_by_the_folder_of_diffusers_or_its_subfolder(tmp_path: Path, whole_pipeline: bool) -> None:
    arch, root = flux(tmp_path), tmp_path / "FLUX.1-dev"
    subfolders = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"}
    for name, subfolder in subfolders.items():
        (root / subfolder).mkdir(parents=True)
        (tmp_path / f"{name}.safetensors").rename(root / subfolder / "model.safetensors")
    places = {name: str(root if whole_pipeline else root / subfolder) for name, subfolder in subfolders.items()}
    moved = Flux(changed(arch.settings, **places))
    clip, t5 = moved.load_text_encoders(torch.float32, CPU)
    assert isinstance(clip, TextEncoder) and isinstance(t5, T5Encoder)
    assert moved.load_vae(torch.float32, CPU).config.latent_channels == 16
    assert len(moved.text_encoder_id()) > 32 and len(moved.vae_id()) == 16


def parts_of(arch: Flux) -> list[torch.nn.Module]:
    encoders = arch.load_text_encoders(torch.float32, CPU)
    return [arch.load_denoiser(torch.float32, CPU), arch.load_vae(torch.float32, CPU), *encoders]


def changed(settings: Settings, **flags: Any) -> Settings:
    groups = dict(settings.groups)
    groups[FluxModelFlags] = replace(groups[FluxModelFlags], **flags)
    return Settings.of(*groups.values())


@pytest.mark.parametrize(
    ("flag", "other", "message"),
    [
        ("clip_l", "t5xxl", "--clip_l: .*is a T5 text encoder alone, not the text encoder CLIP-L"),
        ("t5xxl", "clip_l", "--t5xxl: .*is a CLIP text encoder alone, not the text encoder T5-XXL"),
        ("ae", "model", "--ae: .*is a FLUX or Chroma model, not the FLUX.1 autoencoder"),
        ("t5xxl", "ae", "--t5xxl: .*is an autoencoder"),
    ],
)
def test_a_file_in_the_wrong_place_is_recognised(tmp_path: Path, flag: str, other: str, message: str) -> None:
    arch = flux(tmp_path)
    wrong = Flux(changed(arch.settings, **{flag: str(tmp_path / f"{other}.safetensors")}))
    with pytest.raises(ValueError, match=message):
        wrong.load_text_encoders(torch.float32, CPU)
        wrong.load_vae(torch.float32, CPU)


def test_a_missing_file_is_asked_for(tmp_path: Path) -> None:
    arch = flux(tmp_path, t5xxl=None)
    with pytest.raises(ValueError, match="--t5xxl is missing: FLUX.1 dev needs it"):
        arch.load_text_encoders(torch.float32, CPU)


def test_a_model_type_that_the_file_contradicts_is_said_before_anything_is_read(tmp_path: Path) -> None:
    arch = flux(tmp_path, small.CHROMA, model_type="flux")
    with pytest.raises(ValueError, match="use --model_type chroma"):
        arch.unused_flags()


def test_files_without_weights_are_enough_to_know_sizes(tmp_path: Path) -> None:
    meta = torch.device("meta")
    arch = flux(tmp_path)
    parts = [arch.load_denoiser(torch.float32, meta), *arch.load_text_encoders(torch.float32, meta)]
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())


def test_recomputed_blocks_give_the_same_gradient(tmp_path: Path) -> None:
    arch = flux(tmp_path, apply_t5_attn_mask=True)
    text = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), arch.tokenize(CAPTIONS))
    gradients = []
    for recompute in (False, True):
        denoiser = arch.load_denoiser(torch.float32, CPU)
        weight = denoiser.get_parameter("double_blocks.0.img_attn.qkv.weight").requires_grad_()
        if recompute:
            for block in arch.blocks(denoiser):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        x = torch.ones(2, 16, 4, 6)
        arch.predict(denoiser, x, torch.tensor([100.0, 900.0]), arch.condition(text)).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_half_precision_follows_the_weights(tmp_path: Path) -> None:
    arch = Flux(Settings.of(*small.settings(tmp_path).groups.values(), PrecisionFlags(mixed_precision="bf16")))
    assert arch.process.dtype == torch.bfloat16
    denoiser = arch.load_denoiser(torch.bfloat16, CPU)
    text = arch.encode_text(arch.load_text_encoders(torch.bfloat16, CPU), arch.tokenize(CAPTIONS))
    answer = arch.predict(denoiser, torch.randn(2, 16, 4, 6), torch.tensor([100.0, 900.0]), arch.condition(text))
    assert answer.dtype == torch.bfloat16 and answer.isfinite().all()


def test_flags_of_the_flow_reach_the_process(tmp_path: Path) -> None:
    arch = Flux(Settings.of(*small.settings(tmp_path).groups.values(), FlowFlags(model_prediction_type="raw")))
    assert arch.process.flow.model_prediction_type == "raw"


def test_blocks_to_swap_are_shared_as_recorded() -> None:
    with torch.device("meta"):
        model = FluxTransformer(replace(small.DEV, double_blocks=19, single_blocks=38))
    facts = json.loads((FACTS / "block_swap.json").read_text(encoding="utf-8"))["flux"]
    arch = Flux(Settings.of())
    assert len(arch.blocks(model)) == 19 + 38
    for number, shares in facts["split [double, single] or [main] by blocks_to_swap"].items():
        assert [group.num_swapped for group in arch.swap_groups(model, int(number))] == shares
    with pytest.raises(ValueError, match="36"):
        arch.swap_groups(model, facts["maximum"] + 1)
