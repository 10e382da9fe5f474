"""A network that follows pictures learns to, goes on bit for bit, and says what is wrong with its pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from demo_folder import DemoFolder
from demo_sdxl_folder import SdxlDemo
from library.data.items import Batch
from library.train.control_trainer import TrainedControl
from tests.clients.lllite_training import LlliteRuns, SmallControlTrainer, lllite_settings, write_edges
from tests.clients.training_db import fresh_accelerate


@pytest.fixture(autouse=True)
def _one_precision_a_test() -> None:
    fresh_accelerate()


@pytest.fixture
def runs(small_sdxl: SdxlDemo, tmp_path: Path) -> LlliteRuns:
    return LlliteRuns(small_sdxl, tmp_path)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two files hold the same bits, and something was trained."""
    assert any(key.endswith("up.0.weight") and value.abs().max() > 0 for key, value in first.items())
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def bright_squares(folder: Path, number: int) -> None:
    """Pictures of 64 x 64 with a bright square in one quarter, its size and place a little different each time."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(number):
        pixels = np.full((64, 64, 3), 30, np.uint8)
        height, width = draw.integers(20, 31, 2)
        top = draw.integers(0, 2) * 32 + draw.integers(0, 32 - height)
        left = draw.integers(0, 2) * 32 + draw.integers(0, 32 - width)
        pixels[top : top + height, left : left + width] = 225
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text("drawing", encoding="utf-8")


def test_it_learns_to_follow_edges(runs: LlliteRuns, tmp_path: Path) -> None:
    pictures, edges, data = tmp_path / "squares", tmp_path / "lines", tmp_path / "squares.toml"
    bright_squares(pictures, 96)
    write_edges(pictures, edges)
    data.write_text(
        '[general]\ncaption_extension = ".txt"\n'
        "[[datasets]]\nresolution = 64\nbatch_size = 8\nvalidation_split = 0.17\n"
        f'[[datasets.subsets]]\nimage_dir = "{pictures.as_posix()}"\nconditioning_data_dir = "{edges.as_posix()}"\n',
        encoding="utf-8",
    )
    words = ["--max_train_steps=50", "--learning_rate=1e-2", "--network_dim=32", "--cond_emb_dim=16"]
    # Of so noisy pictures nothing is to be seen, and their velocity is minus what the network must know by the edges.
    words += ["--v_parameterization", "--min_timestep=700", "--validate_every_n_epochs=100", "--cache_latents"]
    trainer = runs.train("run", f"--dataset_config={data}", "--cache_text_encoder_outputs", *words)
    trained = trainer.trained

    class Shuffled(TrainedControl):
        def start_step(self, batch: Batch, seed: int) -> None:
            assert batch.conditioning is not None
            super().start_step(replace(batch, conditioning=batch.conditioning.roll(1, 0)), seed)

    class Blind(TrainedControl):
        def start_step(self, batch: Batch, seed: int) -> None:
            self.network.set_cond_image(None)

    seen = [trained, Shuffled(trained.network), Blind(trained.network)]
    right, shuffled, blind = (trainer.validation.measured(trainer.models, one, 50).average for one in seen)
    assert right < 0.92 * shuffled and right < 0.92 * blind


def test_a_file_is_described_by_modelspec_alone(runs: LlliteRuns) -> None:
    runs.train("run", "--metadata_author=me", "--save_precision=fp16")
    with safe_open(runs.root / "run" / "small.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
        assert file.get_tensor(keys[0]).dtype == torch.float16
    assert all(key.startswith("lllite_unet_") for key in keys)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert metadata["modelspec.author"] == "me" and metadata["modelspec.resolution"] == "64x64"
    assert not [key for key in metadata if key.startswith(("ss_", "sshs_"))]


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(runs: LlliteRuns) -> None:
    data = runs.dataset("shuffled", "shuffle_caption = true\nflip_aug = true")
    words = [f"--dataset_config={data}", "--network_dropout=0.2", "--ema_decay=0.9", "--gradient_checkpointing"]
    words += ["--lr_scheduler=cosine", "--cache_latents"]
    runs.train("whole", *words, "--max_train_steps=4")
    runs.train("first", *words, "--max_train_steps=4", "--save_every_n_steps=2", "--save_state")
    state = runs.root / "first" / "small-step00000002-state"
    runs.train("second", *words, "--max_train_steps=4", f"--resume={state}")
    for stem in ("small", "small-ema"):
        assert same(runs.weights("whole", stem), runs.weights("second", stem))
    assert not same(runs.weights("first", "small-step00000002"), runs.weights("whole"))


def test_a_file_is_trained_on_from_its_very_weights(runs: LlliteRuns, tmp_path: Path) -> None:
    first = runs.train("first")
    file = tmp_path / "first" / "small.safetensors"
    words = [word for word in runs.words("second") if word not in ("--cond_emb_dim", "--network_dim", "8")]
    settings = lllite_settings(*words, f"--network_weights={file}", "--learning_rate=1e-30")
    second = SmallControlTrainer(settings)
    second.train()
    assert second.trained.network.network_dim == first.trained.network.network_dim == 8
    for key, value in runs.weights("first").items():
        torch.testing.assert_close(runs.weights("second")[key], value, atol=1e-25, rtol=0)
    with pytest.raises(ValueError, match=r"small.safetensors has --network_dim 8, not 16"):
        runs.train("third", f"--network_weights={file}", "--network_dim=16")


def test_cached_latents_and_text_train_as_those_made_at_each_step(runs: LlliteRuns) -> None:
    cached = ["--cache_latents", "--cache_text_encoder_outputs"]
    trainer = runs.train("cached", *cached)
    assert trainer.models.text_encoders == [] and trainer.models.vae is None
    runs.train("live", "--cache_latents")
    for key, value in runs.weights("live").items():
        torch.testing.assert_close(runs.weights("cached")[key], value, atol=1e-3, rtol=0)
    on_disk = [*cached, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    try:
        runs.train("disk", *on_disk)
        assert same(runs.weights("cached"), runs.weights("disk"))
    finally:
        for file in runs.demo.pictures.glob("*.npz"):
            file.unlink()


@pytest.mark.parametrize(
    "words",
    [
        "--mixed_precision=bf16 --full_bf16 --sdpa",
        "--mixed_precision=bf16 --fp8_base --gradient_checkpointing",
        "--optimizer_type=Adafactor --fused_backward_pass --optimizer_args relative_step=False scale_parameter=False",
        "--weighted_captions --max_token_length=150 --gradient_accumulation_steps=2 --save_model_as=pt",
    ],
)
def test_what_others_can_do_is_done_here_as_well(runs: LlliteRuns, words: str) -> None:
    trainer = runs.train("run", *words.split())
    full = "full_bf16" in words
    parameters = list(trainer.trained.network.parameters())
    assert all(parameter.dtype == (torch.bfloat16 if full else torch.float32) for parameter in parameters)
    assert any(bool(module.up[0].weight.abs().max() > 0) for module in trainer.trained.network.children())
    assert (runs.root / "run" / ("small.pt" if "pt" in words.split("=") else "small.safetensors")).exists()


def test_previews_follow_the_picture_of_their_prompt(runs: LlliteRuns, tmp_path: Path) -> None:
    runs.dataset()
    edges = sorted((tmp_path / "edges").glob("*.png"))[:2]
    prompts = tmp_path / "prompts.txt"
    lines = [f"drawing --w 64 --h 64 --s 2 --d 1 --cn {edge.as_posix()}" for edge in edges]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    words = ["--max_train_steps=4", "--learning_rate=0.05", f"--sample_prompts={prompts}", "--sample_every_n_steps=4"]
    runs.train("run", *words, "--cache_latents", "--cache_text_encoder_outputs")
    made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "run" / "sample").glob("*.png"))]
    assert len(made) == 2 and made[0].shape == (64, 64, 3)
    assert not np.array_equal(*made)  # of one seed and one prompt
    runs.train("without", *words[:2], "--cache_latents", "--cache_text_encoder_outputs")
    assert same(runs.weights("run"), runs.weights("without"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("drawing", r"prompt 1 \('drawing'\): there is no picture to follow; add one with --cn file.png"),
        ("drawing --cn none.png", r"prompt 1 \('drawing'\): there is no file none.png"),
    ],
)
def test_a_prompt_without_a_picture_is_named_before_anything_is_read(
    runs: LlliteRuns, tmp_path: Path, line: str, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(line, encoding="utf-8")
    trainer = SmallControlTrainer(
        lllite_settings(*runs.words("run", f"--sample_prompts={prompts}", "--sample_at_first"))
    )
    with pytest.raises(ValueError, match=message):
        trainer.start()


def test_pairs_that_do_not_go_together_are_named(runs: LlliteRuns, tmp_path: Path) -> None:
    data = runs.dataset()
    edges = sorted((tmp_path / "edges").glob("*.png"))
    lost, name = edges[0], edges[0].stem
    lost.unlink()
    with pytest.raises(ValueError, match=rf"(?s)do not go together.*{name}.*no conditioning image; expected"):
        runs.train("run", f"--dataset_config={data}")
    write_edges(runs.demo.pictures, tmp_path / "edges")
    (tmp_path / "edges" / "stranger.png").write_bytes(edges[1].read_bytes())
    with pytest.raises(ValueError, match=r"(?s)stranger.*no image of this stem"):
        runs.train("run", f"--dataset_config={data}")


def test_datasets_of_other_kinds_and_other_models_are_refused(
    runs: LlliteRuns, small_sd: DemoFolder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="conditioning_data_dir is missing; this script trains on image pairs"):
        runs.train("run", f"--dataset_config={runs.demo.dataset}")
    cropped = runs.dataset("cropped", "random_crop = true")
    with pytest.raises(ValueError, match="random_crop cannot be used with conditioning_data_dir"):
        runs.train("run", f"--dataset_config={cropped}")
    with pytest.raises(ValueError, match="not Stable Diffusion XL"):
        runs.train("run", "--pretrained_model_name_or_path", str(small_sd.checkpoint))
    with pytest.raises(ValueError, match="is no ControlNet-LLLite; it holds"):
        runs.train("run", f"--network_weights={runs.demo.checkpoint}")
    with pytest.raises(ValueError, match="there is nothing to train: --learning_rate is 0"):
        runs.train("run", "--learning_rate=0")


def test_batches_of_a_custom_dataset_without_second_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no conditioning images with a.png"):
        TrainedControl(None).start_step(Batch(["a"], torch.ones(1), paths=["a.png"]), 1)


def test_a_dry_run_reads_no_weights_and_says_what_there_is_to_train(
    runs: LlliteRuns, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = SmallControlTrainer(lllite_settings(*runs.words("run", "--dry_run")))
    with caplog.at_level("INFO"):
        trainer.dry_run()
    assert "parameter groups\n  control  59,360" in caplog.text
    assert not (runs.root / "run").exists() or not list((runs.root / "run").glob("*.safetensors"))
