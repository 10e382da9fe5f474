"""A whole model is trained: what changes, for how long, in which numbers, and what is written of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor

from demo_folder import DemoFolder
from library.diffusion.process import Draws
from library.files.weights import open_weights
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.sd.architecture import StableDiffusion
from library.models.sd.model_writer import FOLDER_KINDS
from library.train.flat_parameters import FlatParameters
from library.train.step import step_loss
from tests.clients.continuing import tensors
from tests.clients.hub_server import HubServer
from tests.clients.training_db import ModelRuns, SmallModelTrainer, fresh_accelerate

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."


@pytest.fixture(autouse=True)
def _one_precision_a_test() -> Iterator[None]:
    fresh_accelerate()
    yield
    fresh_accelerate()


@pytest.fixture
def runs(small_sd: DemoFolder, tmp_path: Path) -> ModelRuns:
    return ModelRuns(small_sd, tmp_path)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key.startswith(prefix) and "position_ids" not in key}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def moved(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[bool]:
    return [not torch.equal(first[key], second[key]) for key in first]


def test_unet_and_text_encoder_are_trained_and_the_rest_is_carried_over(runs: ModelRuns) -> None:
    runs.train("run", "--max_train_steps", "3")
    before, after = tensors(runs.demo.checkpoint), runs.weights("run")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and before[key].shape == after[key].shape for key in before)
    assert all(moved(part(before, UNET), part(after, UNET)))
    # Rows of words that no caption has get no gradient, but their weights decay.
    assert all(moved(part(before, TEXT), part(after, TEXT)))
    assert equal(part(before, VAE), part(after, VAE))
    with open_weights(runs.root / "run" / "small.safetensors") as file:
        spec = {key.removeprefix("modelspec."): value for key, value in file.metadata.items()}
        assert not any(key.startswith("ss_") for key in file.metadata)
    assert spec["architecture"] == "stable-diffusion-v1" and spec["title"] == "small"
    assert spec["implementation"] == "https://github.com/Stability-AI/generative-models"
    assert (spec["resolution"], spec["prediction_type"]) == ("64x64", "epsilon")


FUSED = (
    *("--optimizer_type=Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"),
    *("--fused_backward_pass", "--max_grad_norm=0"),
)


@pytest.mark.parametrize("words", [(), FUSED], ids=["AdamW", "fused Adafactor"])
def test_the_text_encoder_stops_to_the_bit_after_its_last_step(runs: ModelRuns, words: tuple[str, ...]) -> None:
    trainer = runs.train(
        "run", *words, "--max_train_steps=4", "--stop_text_encoder_training=2", "--save_every_n_steps=2"
    )
    before, at_stop, end = tensors(runs.demo.checkpoint), runs.weights("run", "small-step00000002"), runs.weights("run")
    assert any(moved(part(before, TEXT), part(at_stop, TEXT)))
    assert equal(part(at_stop, TEXT), part(end, TEXT))
    assert all(moved(part(at_stop, UNET), part(end, UNET)))
    assert not trainer.trained.trains_text_encoder


@pytest.mark.parametrize("last", ["-1", "0"])
def test_a_text_encoder_that_is_not_trained_is_in_no_group_and_comes_from_the_base(runs: ModelRuns, last: str) -> None:
    words = (f"--stop_text_encoder_training={last}", "--mixed_precision=bf16", "--max_train_steps=1")
    trainer = runs.train("run", *words)
    assert [group["lr"] for group in trainer.updates.optimizer.param_groups] == [1e-3]
    assert next(trainer.models.text_encoders[0].parameters()).dtype == torch.bfloat16
    assert equal(part(tensors(runs.demo.checkpoint), TEXT), part(runs.weights("run"), TEXT))


def test_both_parts_have_their_rates(runs: ModelRuns) -> None:
    trainer = runs.train("run", "--learning_rate_te=1e-5")
    assert [group["lr"] for group in trainer.updates.optimizer.param_groups] == [1e-3, 1e-5]
    still = runs.train("still", "--learning_rate_te=0", "--learning_rate=1e-3")
    assert [group["lr"] for group in still.updates.optimizer.param_groups] == [1e-3, 0.0]
    assert equal(part(tensors(runs.demo.checkpoint), TEXT), part(runs.weights("still"), TEXT))


def test_weights_are_float32_unless_they_are_to_be_half_and_both_learn(runs: ModelRuns) -> None:
    once = ("--mixed_precision=bf16", "--max_train_steps=1")
    master = runs.train("master", *once)
    fresh_accelerate()
    half = runs.train("half", *once, "--full_bf16", "--learning_rate=1e-2")
    for trainer, dtype in ((master, torch.float32), (half, torch.bfloat16)):
        for module in trainer.trained.modules():
            assert {parameter.dtype for parameter in module.parameters()} == {dtype}
            assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {dtype}
    before = part(tensors(runs.demo.checkpoint), UNET)
    assert all(moved(before, part(runs.weights("master"), UNET)))
    changed = moved({key: value.bfloat16() for key, value in before.items()}, part(runs.weights("half"), UNET))
    assert sum(changed) > 0.9 * len(changed)
    assert {value.dtype for value in part(runs.weights("half"), UNET).values()} == {torch.bfloat16}
    assert {value.dtype for value in part(runs.weights("half"), VAE).values()} == {torch.float32}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_is_continued_before_or_after_the_stop_ends_with_the_same_bits(runs: ModelRuns, stop: int) -> None:
    words = ("--stop_text_encoder_training", str(stop), "--ema_decay=0.9", "--learning_rate_te=1e-4")
    runs.train("whole", *words, "--max_train_steps=4", "--save_every_n_steps=2", "--save_state")
    runs.train("second", *words, "--max_train_steps=4", "--resume", runs.state("whole", "small-step00000002"))
    for stem in ("small", "small-ema"):
        assert equal(runs.weights("whole", stem), runs.weights("second", stem))
    assert not equal(runs.weights("whole"), runs.weights("whole", "small-ema"))


def test_the_loss_of_regularisation_images_has_its_own_weight(runs: ModelRuns) -> None:
    pictures = sorted(runs.demo.pictures.glob("*.png"))
    for folder, names in (("images/1_thing", pictures[:2]), ("reg/1_class", pictures[2:4])):
        (runs.root / folder).mkdir(parents=True)
        for name in names:
            (runs.root / folder / name.name).write_bytes(name.read_bytes())
    words = ("--train_data_dir", str(runs.root / "images"), "--reg_data_dir", str(runs.root / "reg"))
    words += ("--resolution=64", "--max_train_steps=4", "--learning_rate=0", "--optimizer_type=SGD")
    losses: dict[str, list[float]] = {}
    for weight in ("1", "0.25", "0"):
        runs.train(weight, *words, "--prior_loss_weight", weight)
        rows = (runs.root / weight / "small.log.jsonl").read_text(encoding="utf-8").splitlines()
        losses[weight] = [json.loads(row)["loss/current"] for row in rows if "loss/current" in row]
    assert len(losses["1"]) == 4
    of_prior = [loss == 0 for loss in losses["0"]]
    assert sum(of_prior) == 2
    for whole, quarter, is_prior in zip(losses["1"], losses["0.25"], of_prior, strict=True):
        assert quarter == pytest.approx(whole * (0.25 if is_prior else 1), rel=1e-5)


def test_one_picture_is_learnt(runs: ModelRuns) -> None:
    picture = runs.root / "images" / "40_star"
    picture.mkdir(parents=True)
    (picture / "star.png").write_bytes(next(runs.demo.pictures.glob("*star.png")).read_bytes())
    words = ("--train_data_dir", str(runs.root / "images"), "--resolution=64", "--train_batch_size=4")

    def loss(trainer: SmallModelTrainer) -> float:
        batch = next(iter(trainer.loader.epoch(1, 0)))
        with torch.no_grad():
            answers = [
                step_loss(batch, trainer.arch, trainer.models, trainer.trained, Draws.seeded(9), t=t)
                for t in (200, 400, 600, 800)
            ]
        return float(torch.stack(answers).mean())

    before = loss(runs.train("before", *words, "--max_train_steps=1", "--learning_rate=0", "--optimizer_type=SGD"))
    after = loss(runs.train("after", *words, "--max_train_steps=16", "--learning_rate=2e-3"))
    assert after < 0.6 * before


def test_images_for_the_loss_of_networks_are_refused(runs: ModelRuns) -> None:
    more = "custom_attributes.diff_output_preservation = true"
    with pytest.raises(ValueError, match="diff_output_preservation compares with the base model"):
        runs.train("run", "--dataset_config", str(runs.dataset("other", more)))


def test_rows_without_padding_are_as_long_as_the_longest_caption(runs: ModelRuns) -> None:
    runs.train("padded", "--max_train_steps=1")
    trainer = runs.train("short", "--max_train_steps=1", "--no_token_padding")
    captions = ["one star", "drawing, one white star, plain blue background"]
    ids = trainer.arch.tokenize(captions)["input_ids"]
    padded = StableDiffusion(
        Settings.of(
            ModelFlags(
                pretrained_model_name_or_path=str(runs.demo.checkpoint),
                tokenizer_cache_dir=str(runs.demo.tokenizers),
            )
        )
    ).tokenize(captions)["input_ids"]
    end = trainer.arch.tokenizer.eos_token_id
    assert ids.shape[:2] == (2, 1) and 4 < ids.shape[2] < 20
    assert ids[1, 0, -1] == end and ids[1, 0, -2] != end
    assert torch.equal(ids, padded[..., : ids.shape[2]])
    text = trainer.arch.encode_text(trainer.models.text_encoders, {"input_ids": ids})["context"]
    assert text.shape[:2] == (2, ids.shape[2])
    assert not equal(part(runs.weights("padded"), UNET), part(runs.weights("short"), UNET))


@pytest.mark.parametrize("kind", ["ckpt", "diffusers", "diffusers_safetensors"])
def test_models_of_each_kind_come_and_go_as_the_flags_say(runs: ModelRuns, kind: str) -> None:
    words = ("--save_model_as", kind, "--save_every_n_steps=1", "--save_last_n_steps=1", "--max_train_steps=3")
    trainer = runs.train("run", *words, "--save_state", "--save_last_n_steps_state=1", "--save_precision=fp16")
    ending = "" if kind in FOLDER_KINDS else f".{kind}"
    found = sorted(path.name for path in (runs.root / "run").iterdir() if path.name not in ("sample",))
    models = [f"small-step00000003{ending}", f"small{ending}"]
    states = ["small-state", "small-step00000003-state"]
    assert found == sorted([*models, *states, "small.log.jsonl", "small.report.html"])
    again = StableDiffusion(
        Settings.of(
            ModelFlags(
                pretrained_model_name_or_path=str(runs.root / "run" / models[1]),
                tokenizer_cache_dir=str(runs.demo.tokenizers),
            )
        )
    )
    cpu = torch.device("cpu")
    written = dict(again.load_denoiser(torch.float16, cpu).named_parameters())
    kept = dict(trainer.models.denoiser.named_parameters())
    assert [name for name in kept if not torch.equal(written[name], kept[name].half())] == []


def test_folders_are_uploaded_whole(runs: ModelRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        words = ("--save_model_as=diffusers_safetensors", "--huggingface_repo_id=me/models", "--huggingface_token=t")
        runs.train("run", *words, "--max_train_steps=1")
    uploaded = set(hub.repositories["models/me/models"])
    folder = runs.root / "run" / "small"
    assert uploaded == {f"small/{f.relative_to(folder).as_posix()}" for f in folder.rglob("*") if f.is_file()}
    assert "small/unet/diffusion_pytorch_model.safetensors" in uploaded and "small/model_index.json" in uploaded


def test_previews_validation_and_averages_see_the_trained_model(runs: ModelRuns) -> None:
    prompts = runs.root / "prompts.txt"
    prompts.write_text("a star --w 64 --h 64 --s 2\n", encoding="utf-8")
    trainer = runs.train(
        *("run", "--sample_prompts", str(prompts), "--sample_every_n_steps=2", "--validation_split=0.3"),
        *("--validate_every_n_steps=1", "--ema_decay=0.5", "--gradient_checkpointing", "--mixed_precision=bf16"),
    )
    names = {path.name for path in (runs.root / "run").iterdir()}
    assert {"small-best.safetensors", "small-ema.safetensors", "small.safetensors", "sample"} <= names
    assert len(list((runs.root / "run" / "sample").iterdir())) == 1
    assert math.isfinite(trainer.validation.best_loss)


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_read(
    runs: ModelRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    (runs.root / "taken").touch()
    assert SmallModelTrainer(runs.settings("taken")).run() == 2
    lines = capfd.readouterr().err.splitlines()
    assert "taken is a file, so no folder can be made there" in lines[-1]
    assert not any("images" in line for line in lines)


def test_a_state_of_other_parts_is_refused_with_the_reason(runs: ModelRuns) -> None:
    runs.train("first", "--max_train_steps=1", "--save_state_on_train_end")
    words = ("--max_train_steps=2", "--stop_text_encoder_training=-1", "--resume", runs.state("first"))
    with pytest.raises(ValueError, match=r"other parts of the model.*--stop_text_encoder_training"):
        runs.train("second", *words)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_broken(
    runs: ModelRuns, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.files.streaming.content", full)
    trainer = SmallModelTrainer(runs.settings("run", "--save_every_n_steps=1"))
    assert trainer.run() == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert "small-step00000001.safetensors could not be saved: [Errno 28] No space left on device: make room" in last
    assert not [
        path for path in (runs.root / "run").iterdir() if "small" in path.name and path.suffix == ".safetensors"
    ]


def test_a_model_is_never_in_memory_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.train.flat_parameters.LARGEST", 100)
    parameters = [torch.nn.Parameter(torch.full((7, 10), float(number))) for number in range(5)]
    parameters.append(torch.nn.Parameter(torch.ones(300)))
    flat = FlatParameters([{"params": parameters[:3]}, {"params": parameters[3:]}])
    assert [len(values) for values in flat.values] == [80, 80, 80, 80, 80, 304]
    for number in range(5):
        assert torch.equal(parameters[number], torch.full((7, 10), float(number)))
    groups = flat.optimizer_groups(elementwise=True)
    assert [len(group["params"]) for group in groups] == [3, 3]
    flat.retire(1)
    assert [parameter.grad is None for group in groups for parameter in group["params"]] == [False] * 3 + [True] * 3
    assert not any(parameter.requires_grad for parameter in parameters[3:])
    flat.zero_grad()
    flat.check()
