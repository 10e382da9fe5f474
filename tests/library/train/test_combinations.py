"""Every recorded combination of settings that concerns Stable Diffusion ends as it should."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo_folder import DemoFolder
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK
from tests.clients.training import SmallTrainer, small_settings


@dataclass(frozen=True)
class Case:
    """Words of a command line, and how far they come."""

    words: str
    end: str
    """refused: a mistake in the settings (alone: without the words all runs need); warned: a warning about them;
    stops: an error of a dry run; said: a message of a run that ends well."""
    message: str


CASES = {
    "cache_latents_to_disk without cache_latents": Case(
        "--cache_latents_to_disk", "warned", "--cache_latents_to_disk switches --cache_latents on"
    ),
    "adaptive_noise_scale without noise_offset": Case("--adaptive_noise_scale=0.1", "refused", "needs --noise_offset"),
    "scale_v_pred_loss_like_noise_pred without v_parameterization": Case(
        "--scale_v_pred_loss_like_noise_pred", "refused", "needs --v_parameterization"
    ),
    "v_pred_like_loss with v_parameterization": Case(
        "--v_pred_like_loss=0.1 --v_parameterization", "refused", "leave it or --v_parameterization out"
    ),
    "zero_terminal_snr without v_parameterization": Case(
        "--zero_terminal_snr", "warned", "--zero_terminal_snr is made for models that predict velocity"
    ),
    "v2 with clip_skip": Case("--v2 --clip_skip=2", "warned", "--clip_skip=2 is unusual"),
    "cache_latents with color_aug or random_crop in any subset": Case(
        "--dataset_config={random_crop} --cache_latents --dry_run", "stops", "random_crop"
    ),
    "bucket_reso_steps not a multiple of 64": Case(
        "--dataset_config={odd_buckets}", "stops", "bucket_reso_steps = 48; expected a multiple of 64"
    ),
    "full_fp16 without mixed_precision fp16": Case("--full_fp16", "refused", "needs --mixed_precision=fp16"),
    "full_bf16 without mixed_precision bf16": Case("--full_bf16", "refused", "needs --mixed_precision=bf16"),
    "fp8_base or fp8_base_unet with mixed_precision no": Case(
        "--fp8_base", "refused", "--fp8_base and --fp8_base_unet are for storing"
    ),
    "use_8bit_adam with use_lion_optimizer, or either with optimizer_type": Case(
        "--use_8bit_adam --use_lion_optimizer", "refused", "use_8bit_adam.*use_lion_optimizer"
    ),
    "fused_backward_pass with another optimizer than Adafactor, or accumulation > 1": Case(
        "--fused_backward_pass --optimizer_type=AdamW", "refused", "--fused_backward_pass"
    ),
    "lr_warmup_steps != 0 with constant, adafactor or lr_scheduler_type": Case(
        "--lr_warmup_steps=10", "refused", "has no meaning for this schedule"
    ),
    "initial start step >= max_train_steps": Case(
        "--initial_step=5", "stops", "would begin after step 5, but it has 2 steps"
    ),
    "scale_weight_norms with a network lacking support": Case(
        "--network_module=tests.clients.plain_network --scale_weight_norms=1",
        "stops",
        "--scale_weight_norms is not supported by tests.clients.plain_network",
    ),
    "network_module missing": Case("--max_train_steps=1", "refused alone", "--network_module is missing"),
    "dim_from_weights without network_weights": Case("--dim_from_weights", "refused", "needs --network_weights"),
    "log_with tensorboard or all without logging_dir": Case("--log_with=tensorboard", "refused", "needs --logging_dir"),
    "log_with wandb without the package": Case("--log_with=wandb", "refused", "needs the package wandb"),
    "deepspeed": Case("--deepspeed", "refused", "--deepspeed needs the package deepspeed"),
    "persistent_data_loader_workers with 0 workers": Case(
        "--persistent_data_loader_workers --max_data_loader_n_workers=0", "refused", "max_data_loader_n_workers=1"
    ),
    "no images found": Case("--dataset_config={empty}", "stops", "no training images were found"),
    "dataset_config plus train_data_dir, reg_data_dir or in_json": Case(
        "--dataset_config={empty} --train_data_dir=.", "warned", "--train_data_dir is ignored"
    ),
    "sample_every_n_steps/epochs <= 0": Case("--sample_every_n_steps=0", "warned", "makes no previews by steps"),
    "cpu_offload_checkpointing with gradient_checkpointing": Case(
        "--cpu_offload_checkpointing --gradient_checkpointing --dry_run", "said", "a step without content"
    ),
    "debug_dataset": Case("--debug_dataset", "said", "one orange circle"),
}


def concerns(scope: str) -> bool:
    return scope.startswith("all trainers") or "sd" in scope.split()


def test_every_recorded_combination_has_a_case(facts: Path) -> None:
    rows = json.loads((facts / "training" / "combinations.json").read_text(encoding="utf-8"))["checks"]
    assert {row["if"] for row in rows if concerns(row["scope"])} == CASES.keys()


@pytest.fixture
def files(small_sd: DemoFolder, tmp_path: Path) -> dict[str, str]:
    """Dataset files with something wrong in them."""
    (tmp_path / "nothing").mkdir()
    bodies = {
        "random_crop": f'image_dir = "{small_sd.pictures.as_posix()}"\nrandom_crop = true',
        "empty": f'image_dir = "{(tmp_path / "nothing").as_posix()}"',
        "odd_buckets": f'image_dir = "{small_sd.pictures.as_posix()}"',
    }
    for name, body in bodies.items():
        head = "enable_bucket = true\nbucket_reso_steps = 48" if name == "odd_buckets" else ""
        text = f"[[datasets]]\nresolution = 128\ncaption_extension = '.txt'\n{head}\n[[datasets.subsets]]\n{body}\n"
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    return {name: (tmp_path / f"{name}.toml").as_posix() for name in bodies}


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_combination_ends_as_it_should(
    name: str,
    small_sd: DemoFolder,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    words = [word.format_map(files) for word in case.words.split()]
    if "wandb" in case.words:
        monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    caplog.set_level(logging.INFO)
    if case.end.startswith("refused"):
        with pytest.raises(SystemExit) as end:
            if case.end == "refused":
                small_settings(small_sd, tmp_path / "out", *words)
            read_settings(TRAIN_NETWORK, "test", argv=words)
        assert end.value.code == 2
        told = capsys.readouterr().err
    elif case.end == "warned":
        told = "\n".join(small_settings(small_sd, tmp_path / "out", *words).warnings)
    elif case.end == "stops":
        with pytest.raises(ValueError) as error:
            SmallTrainer(small_settings(small_sd, tmp_path / "out", *words)).dry_run()
        told = str(error.value)
    else:
        assert SmallTrainer(small_settings(small_sd, tmp_path / "out", *words)).run() == 0
        told = capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert re.search(case.message, told), told
