"""Every published layout loads, whole and into place; everything else is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_checkpoint import Sizes, small_checkpoint
from library.files.weights import save_safetensors
from library.models import parts
from library.models.parts import locate
from library.models.sd import checkpoint
from library.models.sd.checkpoint import load_text_encoder, load_unet
from library.models.vae.sd import load_vae, vae_id
from tests.library.models.sd.manifests import manifest, without_weights
from tests.parity import recipe

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return small_checkpoint(Sizes(vocabulary=100))


@pytest.fixture(scope="module")
def small_v2(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    cases = Path(__file__).resolve().parents[3] / "parity" / "cases"
    tensors: dict[str, Tensor] = {}
    for name in ("sd21_unet", "sd21_text_encoder"):
        case = json.loads((cases / name / "case.json").read_text(encoding="utf-8"))
        tensors |= recipe.state_dict(case["checkpoint"])
    return tensors


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> dict[Path, dict[str, Any]]:
    return without_weights(monkeypatch, checkpoint)


@pytest.mark.parametrize(("name", "v2"), [("sd15", False), ("sd21", True)])
@pytest.mark.parametrize("optional", [True, False])
def test_published_single_files_load_with_nothing_missing_or_left_over(
    facts: Path, weightless: dict[Path, dict[str, Any]], name: str, v2: bool, optional: bool
) -> None:
    path = Path(f"{name}.safetensors")
    weightless[path] = manifest(facts, name, optional)
    unet = load_unet(path, v2, F32, CPU)
    assert unet.shape.widths == (320, 640, 1280, 1280)
    assert unet.shape.num_heads == ((5, 10, 20, 20) if v2 else (8, 8, 8, 8))
    assert unet.shape.depths == (1, 1, 1, 0)
    assert unet.shape.layers_per_level == 2
    assert unet.shape.context_dim == (1024 if v2 else 768)
    assert unet.shape.use_linear is v2
    config = load_text_encoder(path, v2, F32, CPU).config
    assert config.num_hidden_layers == (23 if v2 else 12)
    assert config.num_attention_heads == (16 if v2 else 12)
    assert config.hidden_act == ("gelu" if v2 else "quick_gelu")
    vae = load_vae(path, "sd", "--pretrained_model_name_or_path", F32, CPU)
    assert tuple(vae.config.block_out_channels) == (128, 256, 512, 512)
    assert vae.config.layers_per_block == 2


def test_a_copy_of_the_unet_for_averaging_is_ignored(facts: Path, weightless: dict[Path, dict[str, Any]]) -> None:
    path = Path("full.ckpt")
    keys = manifest(facts, "sd15")
    weightless[path] = keys | {f"model_ema.{i}": [[3], "float32"] for i in range(5)} | {"loss.x": [[1], "float32"]}
    load_unet(path, False, F32, CPU)


def test_text_encoder_keys_may_lack_text_model(facts: Path, weightless: dict[Path, dict[str, Any]]) -> None:
    path = Path("older.ckpt")
    keys = manifest(facts, "sd15")
    weightless[path] = {key.replace("transformer.text_model.", "transformer."): value for key, value in keys.items()}
    assert load_text_encoder(path, False, F32, CPU).config.hidden_size == 768


def test_a_published_vae_file_loads_with_and_without_its_prefix(
    facts: Path, weightless: dict[Path, dict[str, Any]]
) -> None:
    keys = manifest(facts, "vae_ldm")
    for path, prefix in ((Path("a.pt"), ""), (Path("b.safetensors"), "first_stage_model.")):
        weightless[path] = {prefix + key: value for key, value in keys.items()}
        assert tuple(load_vae(path, "sd", "--vae", F32, CPU).config.block_out_channels) == (128, 256, 512, 512)


def diffusers_folder(
    root: Path, facts: Path, version: str, weightless: dict[Path, dict[str, Any]], ending: str = ".safetensors"
) -> Path:
    text_stem = "pytorch_model" if ending == ".bin" else "model"
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": text_stem}
    for part, stem in parts.items():
        file = root / part / (stem + ending)
        file.parent.mkdir()
        file.touch()
        weightless[file] = manifest(facts, f"{version}_diffusers_{part}")
    return root


@pytest.mark.parametrize(("version", "v2"), [("sd15", False), ("sd21", True)])
@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".fp16.safetensors"])
def test_diffusers_folders_load_with_nothing_missing_or_left_over(
    tmp_path: Path, facts: Path, weightless: dict[Path, dict[str, Any]], version: str, v2: bool, ending: str
) -> None:
    root = diffusers_folder(tmp_path, facts, version, weightless, ending)
    unet = load_unet(root, v2, F32, CPU)
    assert unet.shape.num_heads == ((5, 10, 20, 20) if v2 else (8, 8, 8, 8))
    assert load_text_encoder(root, v2, F32, CPU).config.num_hidden_layers == (23 if v2 else 12)
    assert load_vae(root, "sd", "--pretrained_model_name_or_path", F32, CPU).config.latent_channels == 4
    assert load_vae(root / "vae", "sd", "--vae", F32, CPU).config.latent_channels == 4


def test_the_config_of_a_folder_decides_what_weights_do_not_show(
    tmp_path: Path, facts: Path, weightless: dict[Path, dict[str, Any]]
) -> None:
    root = diffusers_folder(tmp_path, facts, "sd15", weightless)
    (root / "unet" / "config.json").write_text('{"attention_head_dim": 4}', encoding="utf-8")
    (root / "text_encoder" / "config.json").write_text(
        '{"num_attention_heads": 24, "hidden_act": "gelu"}', encoding="utf-8"
    )
    assert load_unet(root, False, F32, CPU).shape.num_heads == (4, 4, 4, 4)
    config = load_text_encoder(root, False, F32, CPU).config
    assert (config.num_attention_heads, config.hidden_act) == (24, "gelu")


def test_a_single_file_and_a_checkpoint_give_the_same_weights(tmp_path: Path, small: dict[str, Tensor]) -> None:
    safetensors, pickled = tmp_path / "a.safetensors", tmp_path / "a.ckpt"
    save_safetensors(small, safetensors)
    torch.save({"state_dict": small, "global_step": 1}, pickled)
    first = load_unet(safetensors, False, torch.float16, CPU)
    second = load_unet(pickled, False, torch.float16, CPU)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert a.dtype == torch.float16 and torch.equal(a, b), name
    source = small["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(
        first.get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"), source.half()
    )
    source = small["model.diffusion_model.output_blocks.2.1.conv.weight"]
    assert torch.equal(first.get_parameter("up_blocks.0.upsamplers.0.conv.weight"), source.half())


def test_projections_of_2x_are_linear_however_they_are_stored(tmp_path: Path, small_v2: dict[str, Tensor]) -> None:
    flat, square = tmp_path / "flat.safetensors", tmp_path / "square.safetensors"
    save_safetensors(small_v2, flat)
    save_safetensors(
        {
            key: value[..., None, None]
            if key.endswith(("proj_in.weight", "proj_out.weight")) and value.ndim == 2
            else value
            for key, value in small_v2.items()
        },
        square,
    )
    a, b = load_unet(flat, True, F32, CPU), load_unet(square, True, F32, CPU)
    weight = a.get_parameter("mid_block.attentions.0.proj_in.weight")
    assert weight.shape == (128, 128)
    assert torch.equal(weight, b.get_parameter("mid_block.attentions.0.proj_in.weight"))


def test_the_wrong_version_is_named_both_ways(
    tmp_path: Path, small: dict[str, Tensor], small_v2: dict[str, Tensor]
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_safetensors(small, one)
    save_safetensors(small_v2, two)
    for load in (load_unet, load_text_encoder):
        with pytest.raises(ValueError, match=r"--v2 is given, but .*one\.safetensors is .* 1\.x model: leave --v2 out"):
            load(one, True, F32, CPU)
        with pytest.raises(ValueError, match=r"two\.safetensors is a Stable Diffusion 2\.x model: add --v2"):
            load(two, False, F32, CPU)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([FIRST, "conditioner.embedders.1.model.ln_final.bias"], "a Stable Diffusion XL model.*sdxl_train_network.py"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX or Chroma model.*flux_train_network.py"),
        (["model.diffusion_model.double_blocks.0.x"], "a FLUX or Chroma model.*flux_train_network.py"),
        (["byt5_in.fc1.weight", "double_blocks.0.x"], "a HunyuanImage model.*hunyuan_image_train_network.py"),
        (["cap_embedder.0.weight", "layers.0.x"], "a Lumina Image 2 model.*lumina_train_network.py"),
        (["model.diffusion_model.joint_blocks.0.x"], "a Stable Diffusion 3 model"),
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA or another network.*--network_weights"),
        (["lora_te_text_model_encoder.hada_w1_a"], "a LoRA or another network"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "an autoencoder .VAE. alone, .*: give it with --vae"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder alone"),
        (["conv_in.weight"], "the U-Net of a diffusers folder: give the folder"),
        (["bn1.weight"], "no Stable Diffusion model; it holds bn1.weight"),
    ],
)
def test_other_files_are_recognised_and_the_right_script_is_named(
    tmp_path: Path, keys: list[str], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_safetensors({key: torch.zeros(2, 4, 1, 1) for key in keys}, path)
    for load in (load_unet, load_text_encoder):
        with pytest.raises(ValueError, match=message) as error:
            load(path, False, F32, CPU)
        assert str(path) in str(error.value)


def test_leftovers_of_other_tools_are_named_and_not_used(
    tmp_path: Path, small: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "merged.safetensors"
    save_safetensors({**small, "stranger.weight": torch.zeros(2)}, path)
    load_unet(path, False, F32, CPU)
    assert "merged.safetensors: 1 weights belong to no part of Stable Diffusion and are not used: stranger.weight" in (
        caplog.text
    )


def test_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inpainting.safetensors"
    save_safetensors({FIRST: torch.zeros(32, 9, 3, 3)}, path)
    with pytest.raises(ValueError, match="takes 9 input channels .* an inpainting model"):
        load_unet(path, False, F32, CPU)


def test_a_missing_and_a_left_over_weight_of_the_unet_are_named(tmp_path: Path, small: dict[str, Tensor]) -> None:
    path = tmp_path / "odd.safetensors"
    gone = "model.diffusion_model.input_blocks.4.0.in_layers.2.weight"
    save_safetensors({key: value for key, value in small.items() if key != gone}, path)
    with pytest.raises(
        ValueError, match=r"odd\.safetensors: the U-Net is not whole: down_blocks\.1\.resnets\.0\.conv1\.weight"
    ):
        load_unet(path, False, F32, CPU)
    save_safetensors(small | {"model.diffusion_model.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"odd\.safetensors: 1 weights do not belong .*model\.diffusion_model\.extra"):
        load_unet(path, False, F32, CPU)


def test_a_vae_of_another_family_and_a_model_without_one_are_refused(
    tmp_path: Path, facts: Path, weightless: dict[Path, dict[str, Any]]
) -> None:
    path = Path("ae.safetensors")
    weightless[path] = manifest(facts, "vae_ldm") | {"decoder.conv_in.weight": [[512, 16, 3, 3], "float32"]}
    with pytest.raises(ValueError, match="--vae: the autoencoder in ae.safetensors has 16 latent channels"):
        load_vae(path, "sd", "--vae", F32, CPU)
    weightless[path] = {FIRST: [[32, 4, 3, 3], "float32"]}
    with pytest.raises(ValueError, match="ae.safetensors holds no autoencoder; give one with --vae"):
        load_vae(path, "sd", "--pretrained_model_name_or_path", F32, CPU)


def test_a_folder_of_another_family_names_the_script(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no unet/diffusion_pytorch_model\.safetensors: a folder of diffusers"):
        load_unet(tmp_path, False, F32, CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"it is a FLUX or Chroma model: use flux_train_network\.py"):
        load_unet(tmp_path, False, F32, CPU)


def test_a_name_that_is_nothing_is_an_error_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--pretrained_model_name_or_path: models/nope.safetensors"):
        locate("models/nope.safetensors")
    with pytest.raises(FileNotFoundError, match="--vae: a/b/c"):
        locate("a/b/c", "--vae")
    assert locate(str(tmp_path)) == tmp_path


def test_one_file_of_weights_is_fetched_for_each_part() -> None:
    files = [
        ".gitattributes",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.bin",
        "v1-5-pruned.ckpt",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert set(parts._hub_files(files)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_the_id_of_a_vae_follows_its_encoder_and_nothing_else(tmp_path: Path, small: dict[str, Tensor]) -> None:
    whole, alone, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "alone", "other"))
    save_safetensors(small, whole)
    prefix = "first_stage_model."
    vae = {key.removeprefix(prefix): value.half() for key, value in small.items() if key.startswith(prefix)}
    save_safetensors(vae | {"decoder.conv_out.bias": torch.ones(3)}, alone)
    save_safetensors(vae | {"encoder.conv_in.bias": torch.ones_like(vae["encoder.conv_in.bias"])}, other)
    assert vae_id(whole, "sd") == vae_id(alone, "sd")
    assert vae_id(other, "sd") != vae_id(alone, "sd")
    assert len(vae_id(whole, "sd")) == 16
