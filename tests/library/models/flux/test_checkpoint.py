from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from library.files.weights import save_safetensors
from library.models.flux import checkpoint
from library.models.flux.checkpoint import load_controlnet, load_transformer, locate, read_variant
from library.models.flux.variants import CHROMA, DEV, SCHNELL
from tests.library.models.flux import small
from tests.library.models.sd.manifests import ManifestFile, manifest

FACTS = Path(__file__).resolve().parents[3] / "facts"
SMALL = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}


def load(path: Path, model_type: str = "flux", **options: Any) -> Any:
    return load_transformer(path, model_type, torch.float32, "cpu", **options)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("shape", "variant"), [(small.DEV, DEV), (small.SCHNELL, SCHNELL), (small.CHROMA, CHROMA)], ids=lambda value: ""
)
def test_sizes_and_kind_come_from_the_file(tmp_path: Path, shape: Any, variant: Any, prefix: str) -> None:
    model = small.transformer(shape)
    path = small.write(model, tmp_path / "model.safetensors", prefix=prefix)
    assert read_variant(path, variant.model_type) == variant
    loaded = load(path, variant.model_type)
    assert loaded.shape == shape
    given = small.inputs(shape)
    assert torch.equal(loaded(**given), model(**given))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("shape", [small.DEV, small.SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_folder_of_diffusers_answers_as_diffusers_does(tmp_path: Path, shape: Any, shards: bool) -> None:
    guides = shape.has_guidance
    theirs = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16, guidance_embeds=guides)
    small.with_random_weights(theirs, 3)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="300KB" if shards else "1GB")
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == shards
    ours = load(tmp_path)
    given = small.inputs(shape)
    expected = theirs(
        given["img"],
        given["txt"],
        given["pooled"],
        given["t"],
        img_ids(given["size"]),
        torch.zeros(5, 3),
        given["guidance"] if guides else None,
    ).sample
    torch.testing.assert_close(ours(**given), expected, atol=2e-5, rtol=1e-4)


def test_chroma_of_diffusers_answers_as_diffusers_does(tmp_path: Path) -> None:
    theirs = ChromaTransformer2DModel(
        **SMALL, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2
    )
    small.with_random_weights(theirs, 3)
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load(tmp_path, "chroma")
    given = small.inputs(small.CHROMA) | {"guidance": torch.zeros(2)}
    mask = torch.ones(2, 5 + 6, dtype=torch.bool)
    mask[0, 3:5] = False
    ids = img_ids(given["size"])
    expected = theirs(given["img"], given["txt"], given["t"], ids, torch.zeros(5, 3), mask).sample
    torch.testing.assert_close(ours(**given, lengths=(3, 5)), expected, atol=2e-5, rtol=1e-4)


def img_ids(size: tuple[int, int]) -> torch.Tensor:
    rows, columns = size
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return ids.reshape(-1, 3)


def test_any_of_several_files_means_all_of_them(tmp_path: Path) -> None:
    model = small.transformer(small.DEV)
    weights = model.state_dict()
    half = len(weights) // 2
    for number, keys in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        save_safetensors({key: weights[key] for key in keys}, tmp_path / f"flux-0000{number}-of-00002.safetensors")
    for path in (tmp_path / "flux-00002-of-00002.safetensors", tmp_path):
        assert torch.equal(load(path)(**small.inputs(small.DEV)), model(**small.inputs(small.DEV)))
    (tmp_path / "flux-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"are missing: flux-00001-of-00002\.safetensors"):
        load(tmp_path / "flux-00002-of-00002.safetensors")


def test_float8_files_are_read(tmp_path: Path) -> None:
    model = small.transformer(small.DEV)
    path = small.write(model, tmp_path / "model.safetensors", torch.float8_e4m3fn)
    loaded = load(path)
    assert loaded.img_in.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.img_in.weight, model.img_in.weight.to(torch.float8_e4m3fn).float())


def test_weights_pass_by_whoever_quantises_them(tmp_path: Path) -> None:
    path = small.write(small.transformer(small.DEV), tmp_path / "model.safetensors")
    seen: list[str] = []

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return value

    loaded = load(path, on_weight=keep)
    assert sorted(seen) == sorted(loaded.state_dict())


@pytest.mark.parametrize(
    ("shape", "model_type", "message"),
    [
        (small.CHROMA, "flux", "--model_type flux is given, but .*is Chroma: use --model_type chroma"),
        (small.DEV, "chroma", "--model_type chroma is given, but .*is FLUX.1 dev: use --model_type flux"),
    ],
)
def test_a_model_type_that_the_file_contradicts_is_an_error(
    tmp_path: Path, shape: Any, model_type: str, message: str
) -> None:
    path = small.write(small.transformer(shape), tmp_path / "model.safetensors")
    for read in (read_variant, load):
        with pytest.raises(ValueError, match=message):
            read(path, model_type)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion model.*use train_network.py"),
        ("conditioner.embedders.0.x", "a Stable Diffusion XL model.*use sdxl_train_network.py"),
        ("cap_embedder.0.weight", "a Lumina Image 2 model.*use lumina_train_network.py"),
        ("byt5_in.fc1.weight", "a HunyuanImage model.*use hunyuan_image_train_network.py"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA or another network.*--network_weights"),
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("encoder.conv_in.weight", r"an autoencoder \(VAE\) alone"),
        ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder alone"),
        ("shared.weight", "a T5 text encoder alone"),
        ("bn1.weight", "something with the keys bn1.weight"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "other.safetensors"
    save_safetensors({key: torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_folder_of_another_pipeline_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}), "utf-8")
    with pytest.raises(ValueError, match="a Stable Diffusion XL model.*use sdxl_train_network.py"):
        load(tmp_path)


def test_a_folder_without_weights_and_one_with_several_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        load(tmp_path)
    for name in ("ae", "flux1-dev"):
        save_safetensors({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several files of weights .ae, flux1-dev.: name one"):
        load(tmp_path)


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    weights = small.transformer(small.DEV).state_dict()
    path = tmp_path / "model.safetensors"
    save_safetensors({key: value for key, value in weights.items() if not key.startswith("single_blocks.1.")}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: 8 weights are missing: single_blocks\.1\.linear1\.bias"):
        load(path)
    save_safetensors(weights | {"single_blocks.0.surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 weights do not belong to this model: single_blocks\.0\.surplus"):
        load(path)
    save_safetensors(weights | {"txt_in.weight": torch.zeros(63, 32)}, path)
    with pytest.raises(ValueError, match=r"txt_in\.weight has shape \[63, 32\], expected \[64, 32\]"):
        load(path)
    save_safetensors({key: value for key, value in weights.items() if key != "img_in.weight"}, path)
    with pytest.raises(ValueError, match=r"not whole: img_in\.weight is missing"):
        load(path)


def test_an_unknown_weight_of_diffusers_is_named(tmp_path: Path) -> None:
    theirs = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16)
    path = tmp_path / "model.safetensors"
    save_safetensors(theirs.state_dict() | {"transformer_blocks.0.attn.surplus.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"do not belong to this model: transformer_blocks\.0\.attn\.surplus\.weight"):
        load(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = small.write(small.transformer(small.DEV), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
        load(path)


def test_models_for_filling_in_are_refused(tmp_path: Path) -> None:
    weights = small.transformer(small.DEV).state_dict()
    path = tmp_path / "model.safetensors"
    save_safetensors(weights | {"img_in.weight": torch.zeros(64, 384)}, path)
    with pytest.raises(ValueError, match="384 channels a patch where FLUX.1 takes 64"):
        load(path)


@pytest.mark.parametrize("scale_shape", [(), (1,), (64, 1)])
def test_scaled_float8_weights_are_multiplied_out(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    model = small.transformer(small.DEV)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    key = "double_blocks.0.img_attn.proj.weight"
    scale = torch.full(scale_shape, 0.004)
    weights[key] = (weights[key] / 0.004).to(torch.float8_e4m3fn)
    more = {"scaled_fp8": torch.zeros(2), "double_blocks.0.img_attn.proj.scale_weight": scale}
    more["double_blocks.0.img_attn.proj.scale_input"] = torch.ones(())
    path = tmp_path / "model.safetensors"
    save_safetensors(weights | more, path)
    loaded = load(path).state_dict()[key]
    torch.testing.assert_close(loaded, weights[key].float() * 0.004)
    save_safetensors(weights | more | {"double_blocks.0.img_attn.proj.scale_weight": torch.ones(64, 2)}, path)
    with pytest.raises(ValueError, match=r"proj\.scale_weight has shape \[64, 2\]: only float8 weights with one scale"):
        load(path)


def test_there_must_be_something_of_that_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"--model: no/such\.safetensors: no such file"):
        locate("no/such.safetensors", "--model")


@pytest.mark.parametrize(
    ("name", "model_type", "blocks", "parameters"),
    [
        ("flux_dev", "flux", (19, 38), 11_901_408_320),
        ("flux_schnell", "flux", (19, 38), 11_891_178_560),
        ("chroma", "chroma", (19, 38), 8_899_983_424),
    ],
)
def test_published_files_load_on_the_meta_device(
    monkeypatch: pytest.MonkeyPatch, name: str, model_type: str, blocks: tuple[int, int], parameters: int
) -> None:
    keys = manifest(FACTS, name)
    monkeypatch.setattr(checkpoint, "open_model", lambda path: ManifestFile(path, keys))
    model = load_transformer(Path(f"{name}.safetensors"), model_type, torch.bfloat16, "meta")
    assert (len(model.double_blocks), len(model.single_blocks)) == blocks
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.shape.num_heads == 24 and model.img_in.weight.dtype == torch.bfloat16


def test_the_published_controlnet_loads_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = manifest(FACTS, "flux_controlnet")
    monkeypatch.setattr(checkpoint, "open_model", lambda path: ManifestFile(path, keys))
    net = load_controlnet(Path("controlnet.safetensors"), torch.bfloat16, "meta")
    assert len(net.double_blocks) == len(net.controlnet_blocks) == 2


def test_a_controlnet_is_read_and_others_are_refused(tmp_path: Path) -> None:
    net = small.controlnet()
    loaded = load_controlnet(small.write(net, tmp_path / "net.safetensors"), torch.float32, "cpu")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state_dict().items())
    model = small.write(small.transformer(small.DEV), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a FLUX or Chroma model, not a FLUX ControlNet"):
        load_controlnet(model, torch.float32, "cpu")
    theirs = FluxControlNetModel(**SMALL | {"num_layers": 1, "num_single_layers": 1}, pooled_projection_dim=16)
    other = tmp_path / "theirs.safetensors"
    save_safetensors(theirs.state_dict(), other)
    with pytest.raises(ValueError, match="is a ControlNet of diffusers, which is another network"):
        load_controlnet(other, torch.float32, "cpu")
