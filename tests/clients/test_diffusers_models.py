"""diffusers reads the whole models that we write, and calculates with them what we do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from demo_folder import DemoFolder
from library.files.weights import save_safetensors
from library.models.sd.checkpoint import load_text_encoder
from library.models.sd.model_writer import FOLDER_KINDS, ModelWriter
from tests.clients.training_db import ModelRuns, SmallModelTrainer
from tests.library.models.sd.test_model_writer import file_of_2x, writer
from tests.library.models.sd.test_model_writer import trained as trained_weights

KINDS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")


@pytest.fixture(scope="module")
def trained(
    small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallModelTrainer, dict[str, Path]]:
    """A run, and its model in every layout."""
    root = tmp_path_factory.mktemp("models")
    trainer = ModelRuns(small_sd, root).train("run", "--max_train_steps=3", "--stop_text_encoder_training=2")
    weights = trainer.trained.weights()
    paths = {}
    for kind in KINDS:
        paths[kind] = root / (f"{kind}_folder" if kind in FOLDER_KINDS else f"model.{kind}")
        trainer.arch.model_writer(kind, None).write(paths[kind], weights, {"modelspec.title": "a"}, 3, 1)
    return trainer, paths


def loaded(kind: str, paths: dict[str, Path]) -> StableDiffusionPipeline:
    options = {"safety_checker": None, "local_files_only": True, "torch_dtype": torch.float32}
    if kind in FOLDER_KINDS:
        options |= {"use_safetensors": kind == "diffusers_safetensors"}
        return StableDiffusionPipeline.from_pretrained(paths[kind], **options)
    config = str(paths["diffusers_safetensors"])
    return StableDiffusionPipeline.from_single_file(str(paths[kind]), config=config, **options)


@torch.no_grad()
def answers_of(pipeline: StableDiffusionPipeline, trainer: SmallModelTrainer, x: Tensor, t: Tensor) -> list[Tensor]:
    ids = trainer.arch.tokenize(["one white star"])["input_ids"][:, 0]
    context = pipeline.text_encoder(ids)[0]
    return [context, pipeline.unet(x, t, context).sample, pipeline.vae.decode(x).sample]


@torch.no_grad()
def our_answers(trainer: SmallModelTrainer, x: Tensor, t: Tensor) -> list[Tensor]:
    models, arch = trainer.models, trainer.arch
    vae = arch.load_vae(torch.float32, torch.device("cpu"))
    context = arch.encode_text(models.text_encoders, arch.tokenize(["one white star"]))["context"]
    return [context, models.denoiser(x, t, context), vae.decode(x).sample]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_of_diffusers_answers_as_our_models_do(
    trained: tuple[SmallModelTrainer, dict[str, Path]], kind: str
) -> None:
    trainer, paths = trained
    pipeline = loaded(kind, paths)
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([321])
    theirs, ours = answers_of(pipeline, trainer, x, t), our_answers(trainer, x, t)
    for first, second in zip(theirs, ours, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    own = dict(trainer.models.denoiser.named_parameters())
    loaded_unet = pipeline.unet.state_dict()
    assert own.keys() == loaded_unet.keys() and all(torch.equal(own[key], loaded_unet[key]) for key in own)


def test_a_folder_makes_pictures_by_itself(trained: tuple[SmallModelTrainer, dict[str, Path]]) -> None:
    pipeline = loaded("diffusers_safetensors", trained[1])
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("one white star", num_inference_steps=2, height=64, width=64).images
    assert picture.size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.tokenizer("one white star").input_ids == trained[0].arch.tokenizer("one white star").input_ids


@pytest.mark.parametrize("source", ["folder", "single file", "single file of that folder"])
def test_2x_with_its_other_text_encoder_is_read_too(tmp_path: Path, source: str) -> None:
    cpu, base = torch.device("cpu"), tmp_path / "base.safetensors"
    save_safetensors(file_of_2x(), base)
    new = trained_weights(base, True)
    folder, single = tmp_path / "folder", tmp_path / "single.safetensors"
    writer(base, True, "diffusers_safetensors", tmp_path).write(folder, new, {}, 1, 1)
    if source == "folder":
        pipeline = loaded("diffusers_safetensors", {"diffusers_safetensors": folder})
    else:
        made_from, weights = (base, new) if source == "single file" else (folder, {})
        ModelWriter(made_from, None, True, "safetensors").write(single, weights, {}, 1, 1)
        pipeline = loaded("safetensors", {"safetensors": single, "diffusers_safetensors": folder})
    ids = torch.arange(77)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            pipeline.text_encoder(ids)[0], load_text_encoder(folder, True, torch.float32, cpu)(ids)
        )
    unet = pipeline.unet.state_dict()
    assert all(torch.equal(unet[name], value) for name, value in new["unet"].items())
