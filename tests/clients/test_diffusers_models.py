"""diffusers reads the whole models that we write, and calculates with them what we do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from demo_folder import DemoFolder
from library.models.sd.model_writer import FOLDER_KINDS
from tests.clients.training_db import ModelRuns, SmallModelTrainer

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
