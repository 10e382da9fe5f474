"""Whole models are written with the keys of the published layouts, and come back bit by bit, from either layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo_checkpoint import Sizes, small_checkpoint
from demo_tokenizer import write_tokenizer
from library.files.weights import open_weights, save_safetensors
from library.models import parts as model_parts
from library.models.sd import model_writer
from library.models.sd.checkpoint import load_text_encoder, load_unet
from library.models.sd.folder_files import FolderParts, folder_files
from library.models.sd.model_writer import FOLDER_KINDS, ModelWriter
from library.models.text.tokens import load_tokenizer
from library.models.vae.sd import load_vae
from tests.library.models.sd.manifests import ManifestFile, manifest
from tests.parity import recipe

CPU, META = torch.device("cpu"), torch.device("meta")
F32 = torch.float32
KINDS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")


def file_of_2x() -> dict[str, Tensor]:
    """A small model of 2.x, with a table and a moving average as published files have them."""
    cases = Path(__file__).resolve().parents[3] / "parity" / "cases"
    tensors = {key: value for key, value in small_checkpoint(Sizes(vocabulary=100)).items() if "first_stage" in key}
    for name in ("sd21_unet", "sd21_text_encoder"):
        case = json.loads((cases / name / "case.json").read_text(encoding="utf-8"))
        tensors |= recipe.state_dict(case["checkpoint"])
    width = tensors["cond_stage_model.model.ln_final.weight"].shape[0]
    for key, value in tensors.items():
        if key.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):  # of the two cases neither fits the other
            generator = torch.Generator().manual_seed(value.shape[0])
            tensors[key] = torch.randn(value.shape[0], width, generator=generator) / width**0.5
    return tensors | {"betas": torch.linspace(0, 1, 1000, dtype=torch.float64), "model_ema.decay": torch.tensor(0.9)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether it is 2.x -> a single file; the weights of its autoencoder are half as wide as the others."""
    folder = tmp_path_factory.mktemp("bases")
    files = {False: small_checkpoint(Sizes(vocabulary=100)), True: file_of_2x()}
    for v2, tensors in files.items():
        halved = {key: value.half() if key.startswith("first_stage_model") else value for key, value in tensors.items()}
        save_safetensors(halved, folder / f"{v2}.safetensors")
    return {v2: folder / f"{v2}.safetensors" for v2 in files}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def trained(base: Path, v2: bool) -> dict[str, dict[str, Tensor]]:
    """New weights of U-Net and text encoder: those of the base, and one more."""
    modules = {"unet": load_unet(base, v2, F32, CPU), "text_encoder": load_text_encoder(base, v2, F32, CPU)}
    return {part: {name: value + 1 for name, value in weights(module).items()} for part, module in modules.items()}


def writer(base: Path, v2: bool, kind: str, folder: Path, **more: Any) -> ModelWriter:
    if kind not in FOLDER_KINDS:
        return ModelWriter(base, None, v2, kind, **more)
    write_tokenizer(folder / "openai_clip-vit-large-patch14", ["star"])
    parts = FolderParts(
        load_unet(base, v2, F32, META).shape,
        load_text_encoder(base, v2, F32, META),
        load_vae(base, "sd", "--vae", F32, META),
        load_tokenizer("openai/clip-vit-large-patch14", "", str(folder)),
    )
    return ModelWriter(base, None, v2, kind, small_files=folder_files(parts, base, False, False), **more)


def path_of(folder: Path, name: str, kind: str) -> Path:
    return folder / (name if kind in FOLDER_KINDS else f"{name}.{kind}")


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back_bit_by_bit_and_so_does_what_is_made_from_that(
    tmp_path: Path, bases: dict[bool, Path], v2: bool, kind: str
) -> None:
    base, new = bases[v2], trained(bases[v2], v2)
    first = path_of(tmp_path, "first", kind)
    one = writer(base, v2, kind, tmp_path)
    one.write(first, new, {}, 1, 1)
    one.check(first, new)
    back = "ckpt" if kind in FOLDER_KINDS else "diffusers_safetensors"
    second = path_of(tmp_path, "second", back)
    two = writer(first, v2, back, tmp_path)
    two.write(second, {"unet": new["unet"]}, {}, 1, 1)
    two.check(second, {"unet": new["unet"]})
    for written in (first, second):
        read = {"unet": load_unet(written, v2, F32, CPU), "text_encoder": load_text_encoder(written, v2, F32, CPU)}
        for part, module in read.items():
            assert weights(module).keys() == new[part].keys()
            assert all(torch.equal(value, new[part][name]) for name, value in weights(module).items())
        before, after = (load_vae(path, "sd", "--vae", torch.float16, CPU).state_dict() for path in (base, written))
        assert all(torch.equal(before[name], after[name]) for name in before)
    config = load_text_encoder(second, v2, F32, CPU).config
    assert config.hidden_act == ("gelu" if v2 else "quick_gelu")


def test_a_single_file_keeps_the_keys_of_its_base_and_what_nobody_trained(
    tmp_path: Path, bases: dict[bool, Path]
) -> None:
    new = trained(bases[True], True)
    for kind in ("safetensors", "ckpt"):
        path = tmp_path / f"new.{kind}"
        ModelWriter(bases[True], None, True, kind).write(path, new, {"modelspec.title": "new"}, 7, 2)
        with open_weights(bases[True]) as base, open_weights(path) as file:
            left_out = {key for key in base.keys() if key.startswith("model_ema.")}
            assert left_out and set(file.keys()) == set(base.keys()) - left_out
            assert all(file.shape(key) == base.shape(key) for key in file.keys())
            kept = [key for key in file.keys() if torch.equal(file.read(key), base.read(key))]
            assert {"betas", "cond_stage_model.model.text_projection"} < set(kept)
            assert not any(key.startswith("model.diffusion_model.") for key in kept)
            assert file.metadata == ({"modelspec.title": "new"} if kind == "safetensors" else {})
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert (content["global_step"], content["epoch"]) == (7, 2)


def test_a_precision_is_that_of_the_three_parts_and_not_of_tables(tmp_path: Path, bases: dict[bool, Path]) -> None:
    path = tmp_path / "new.safetensors"
    new = trained(bases[True], True)
    ModelWriter(bases[True], None, True, "safetensors", torch.bfloat16).write(path, new, {}, 1, 1)
    with open_weights(path) as file:
        kinds = {key.partition(".")[0]: file.dtype(key) for key in file.keys() if "text_projection" not in key}
        assert kinds.pop("betas") == torch.float64
        assert file.dtype("cond_stage_model.model.text_projection") == F32
        assert file.dtype("first_stage_model.quant_conv.weight") == torch.bfloat16
        assert file.dtype("model.diffusion_model.out.2.weight") == torch.bfloat16


def test_the_answer_is_the_hash_of_the_file_as_it_lies_there(tmp_path: Path, bases: dict[bool, Path]) -> None:
    new = trained(bases[False], False)
    for kind in KINDS:
        path = path_of(tmp_path, "new", kind)
        hashes = writer(bases[False], False, kind, tmp_path).write(path, new, {}, 1, 1)
        assert len(hashes) == (3 if kind in FOLDER_KINDS else 1)
        for name, digest in hashes.items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_another_vae_takes_the_place_of_the_model_s_own(tmp_path: Path, bases: dict[bool, Path]) -> None:
    own = small_checkpoint(Sizes(vocabulary=100), seed=5)
    vae = tmp_path / "vae.safetensors"
    save_safetensors({key: value for key, value in own.items() if key.startswith("first_stage_model")}, vae)
    for kind in ("ckpt", "diffusers"):
        path = path_of(tmp_path, "new", kind)
        ModelWriter(bases[False], vae, False, kind).write(path, {}, {}, 1, 1)
        wanted, found = (load_vae(place, "sd", "--vae", F32, CPU).state_dict() for place in (vae, path))
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("version", ["sd15", "sd21"])
def test_published_layouts_are_made_from_each_other_with_exactly_their_keys(
    tmp_path: Path, facts: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder, single = tmp_path / "folder", tmp_path / "single.safetensors"
    names = FOLDER_KINDS["diffusers_safetensors"]
    parts = {folder / file: manifest(facts, f"{version}_diffusers_{part}", False) for part, file in names.items()}
    for file in parts:
        file.parent.mkdir(parents=True)
        file.touch()
    files = parts | {single: manifest(facts, version, False)}
    opened: Callable[[Path], ManifestFile] = lambda path: ManifestFile(path, files[path])  # noqa: E731
    for module in (model_parts, model_writer):
        monkeypatch.setattr(module, "open_weights", opened)

    def shapes(content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(shape) for key, (shape, _) in content.items()}

    v2 = version == "sd21"
    with ModelWriter(folder, None, v2, "safetensors").planned({}) as planned:
        assert {key: value.shape for key, value in planned[""].items()} == shapes(files[single])
        assert all(value.dtype == F32 for key, value in planned[""].items() if "position_ids" not in key)
    with ModelWriter(single, None, v2, "diffusers").planned({}) as planned:
        for part, file in FOLDER_KINDS["diffusers"].items():
            assert {key: value.shape for key, value in planned[file].items()} == shapes(parts[folder / names[part]])
    with ModelWriter(single, None, v2, "ckpt").planned({}) as planned:
        assert list(planned[""]) == list(files[single])


def test_a_file_that_lacks_or_adds_a_key_is_not_accepted(tmp_path: Path, bases: dict[bool, Path]) -> None:
    path, writes = tmp_path / "new.safetensors", ModelWriter(bases[False], None, False, "safetensors")
    tensors = small_checkpoint(Sizes(vocabulary=100))
    tensors["extra"] = tensors.pop("model.diffusion_model.out.2.bias")
    save_safetensors(tensors, path)
    with pytest.raises(ValueError, match=r"1 keys missing: .*out\.2\.bias; 1 keys not of this model: extra"):
        writes.check(path, {})


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path, bases: dict[bool, Path]) -> None:
    new = trained(bases[False], False)
    for kind in KINDS:
        path = path_of(tmp_path, "model", kind)
        writes = writer(bases[False], False, kind, tmp_path / "tokenizers")
        writes.write(path, new, {}, 1, 1)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} or path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", _full)
            patch.setattr("library.files.streaming.content", _full)
            with pytest.raises(OSError, match="No space left"):
                writes.write(path, new, {}, 2, 2)
        after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} or path.read_bytes()
        assert after == before
        assert {one.name for one in tmp_path.iterdir()} <= {path_of(tmp_path, "model", k).name for k in KINDS} | {
            "tokenizers"
        }


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")
