"""flux_train_network.py on the small models: the published commands, what they leave, and what they learn."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from demo_flux_folder import FluxDemo
from demo_flux_weights import FluxSizes, small_transformer
from library.files.weights import open_weights, save_safetensors
from library.models.flux.model import FluxShape
from tests.clients.continuing import equal, tensors
from tests.clients.flux_training import SmallFluxTrainer, flux_settings, train_flux
from tests.library.models.flux import small
from tests.scripts.test_train_network import launch

# As published; paths, the number of blocks (of 57) and, without a GPU, the precision are those of this place.
FLUX_COMMAND = """
  --pretrained_model_name_or_path="{transformer}" --clip_l="{clip_l}" --t5xxl="{t5xxl}" --ae="{ae}"
  --dataset_config="{dataset}" --output_dir="{output}" --output_name="my_flux_lora" --save_model_as=safetensors
  --network_module=networks.lora_flux --network_dim=16 --network_alpha=1 --learning_rate=1e-4
  --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa --max_train_epochs=10 --save_every_n_epochs=1
  --mixed_precision="bf16" --gradient_checkpointing --guidance_scale=1.0 --timestep_sampling="flux_shift"
  --model_prediction_type="raw" --blocks_to_swap=2 --cache_text_encoder_outputs --cache_latents
"""
CHROMA_COMMAND = """
  --pretrained_model_name_or_path="{transformer}" --model_type=chroma --t5xxl="{t5xxl}" --ae="{ae}"
  --dataset_config="{dataset}" --output_dir="{output}" --output_name="my_chroma_lora" --guidance_scale=0.0
  --timestep_sampling="sigmoid" --apply_t5_attn_mask --network_module=networks.lora_flux --network_dim=16
  --network_alpha=1 --learning_rate=1e-4 --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa
  --max_train_epochs=2 --gradient_checkpointing
"""
FEW = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64
batch_size = 4

  [[datasets.subsets]]
  image_dir = "{folder}"
"""


def few_pictures(demo: FluxDemo, folder: Path) -> Path:
    """A dataset of two pictures, for runs that cost little."""
    folder.mkdir()
    for picture in sorted(demo.pictures.glob("*.png"))[:2]:
        for file in (picture, picture.with_suffix(".txt")):
            (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "few.toml"
    config.write_text(FEW.format(folder=folder.as_posix()), encoding="utf-8")
    return config


def published(command: str, demo: FluxDemo, folder: Path, kind: str) -> list[str]:
    """The command's words, with a transformer of enough blocks for some of them to be swapped."""
    names = {name: getattr(demo, name) for name in ("clip_l", "t5xxl", "ae")}
    transformer = folder / f"deep_{kind}.safetensors"
    save_safetensors(small_transformer(FluxSizes(double_blocks=4, single_blocks=8), kind), transformer)
    dataset = few_pictures(demo, folder / "few")
    filled = command.format(transformer=transformer, dataset=dataset, output=folder / "out", **names)
    return [*shlex.split(filled), "--tokenizer_cache_dir", str(demo.tokenizers), "--max_data_loader_n_workers", "0"]


def rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def test_the_published_command_for_flux_runs_as_it_is(small_flux: FluxDemo, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process", "1")
    words = published(FLUX_COMMAND, small_flux, tmp_path, "dev")
    result = launch(*words, "--max_train_epochs=3", script="flux_train_network.py", launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [*(f"my_flux_lora-{epoch:06d}.safetensors" for epoch in range(1, 3)), "my_flux_lora.safetensors"]
    with open_weights(tmp_path / "out" / "my_flux_lora.safetensors") as file:
        parts = {key.split("_")[1] for key in file.keys()}
        assert parts == {"unet", "te1"}  # CLIP-L is trained beside the cached T5-XXL
        metadata = file.metadata
    assert metadata["ss_base_model_version"] == "flux1" and metadata["ss_timestep_sampling"] == "flux_shift"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert metadata["ss_model_prediction_type"] == "raw" and metadata["ss_guidance_scale"] == "1.0"


def test_the_published_command_for_chroma_runs_without_caches(small_flux: FluxDemo, tmp_path: Path) -> None:
    SmallFluxTrainer(flux_settings(published(CHROMA_COMMAND, small_flux, tmp_path, "chroma"))).train()
    with open_weights(tmp_path / "out" / "my_chroma_lora.safetensors") as file:
        assert {key.split("_")[1] for key in file.keys()} == {"unet"}
        assert file.metadata["modelspec.architecture"] == "chroma/lora"
        assert file.metadata["ss_apply_t5_attn_mask"] == "True"


def test_training_lowers_the_loss_of_pictures_that_are_held_out(small_flux: FluxDemo, tmp_path: Path) -> None:
    words = ["--max_train_steps", "60", "--learning_rate", "5e-3", "--network_alpha", "4", "--cache_latents"]
    words += ["--cache_text_encoder_outputs", "--network_train_unet_only", "--validation_split", "0.35"]
    train_flux(small_flux, tmp_path, *words, "--validate_every_n_steps", "10")
    found = [row for row in rows(tmp_path / "small.log.jsonl") if "loss/validation/step_average" in row]
    losses = [row["loss/validation/step_average"] for row in found]
    assert len(losses) == 6 and all(
        {f"loss/validation/t{t}" for t in (200, 400, 600, 800)} <= row.keys() for row in found
    )
    assert losses[-1] < 0.75 * losses[0], losses
    assert (tmp_path / "small-best.safetensors").exists()


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_cached_text_trains_as_text_encoded_at_every_step(small_flux: FluxDemo, tmp_path: Path, kind: str) -> None:
    def trained(name: str, *words: str) -> dict[str, Tensor]:
        words = ("--network_train_unet_only", "--cache_latents", *words)
        train_flux(small_flux, tmp_path / name, *words, kind=kind)
        return tensors(tmp_path / name / "small.safetensors")

    trained("start")  # adapters of text encoders, where there are any, take part in the first random numbers
    start = ("--network_weights", str(tmp_path / "start" / "small.safetensors"))
    live, cached = trained("live", *start), trained("cached", *start, "--cache_text_encoder_outputs")
    assert live.keys() == cached.keys()
    for key, value in live.items():
        torch.testing.assert_close(value, cached[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        ("--cache_text_encoder_outputs", "--cache_latents", "--timestep_sampling", "sigma", "--ip_noise_gamma", "0.1"),
        ("--network_train_unet_only", "--weighting_scheme", "logit_normal", "--model_prediction_type", "sigma_scaled"),
    ],
    ids=["CLIP-L beside cached T5", "nothing cached"],
)
def test_a_run_continues_with_equal_bits(small_flux: FluxDemo, tmp_path: Path, words: tuple[str, ...]) -> None:
    words = (*words, "--max_train_steps", "5", "--network_dropout", "0.2")
    train_flux(small_flux, tmp_path / "whole", *words, "--save_every_n_steps", "3", "--save_state")
    state = tmp_path / "whole" / "small-step00000003-state"
    train_flux(small_flux, tmp_path / "resumed", *words, "--resume", str(state))
    assert equal(tensors(tmp_path / "whole" / "small.safetensors"), tensors(tmp_path / "resumed" / "small.safetensors"))


def test_previews_follow_a_controlnet_and_their_prompts(small_flux: FluxDemo, tmp_path: Path) -> None:
    shape = FluxShape(64, 128, 4, 512, 32, double_blocks=1, single_blocks=0, pooled_dim=64, has_guidance=True)
    net = small.write(small.controlnet(shape), tmp_path / "net.safetensors")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "control.png")
    line = "a red star --w 96 --h 64 --s 2 --d 1"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"{line}\n{line}\n{line} --cn {tmp_path / 'control.png'}\n{line} --l 3 --n dark\n{line} --g 9\n",
        encoding="utf-8",
    )
    words = ["--sample_prompts", str(prompts), "--sample_at_first", "--cache_text_encoder_outputs"]
    words += ["--controlnet_model_name_or_path", str(net), "--max_train_steps", "1", "--network_train_unet_only"]
    train_flux(
        small_flux, tmp_path / "out", *words, "--dataset_config", str(few_pictures(small_flux, tmp_path / "few"))
    )
    files = sorted((tmp_path / "out" / "sample").glob("*.png"))
    assert [Image.open(file).size for file in files] == [(96, 64)] * 5
    plain, again, *others = (np.asarray(Image.open(file)) for file in files)
    assert np.array_equal(plain, again)
    assert not any(np.array_equal(plain, other) for other in others)


def test_mistakes_that_only_the_files_tell_are_named(small_flux: FluxDemo, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(small_flux.t5xxl.read_bytes()[:-1000])
    for words, said in (
        (("--t5xxl", str(half)), "half.safetensors"),
        (("--model_type", "chroma"), "small_dev.safetensors is FLUX"),
        (("--pretrained_model_name_or_path", str(small_flux.ae)), "ae.safetensors is"),
        (("--t5xxl", str(small_flux.clip_l)), "--t5xxl"),
        (("--text_encoder_lr", "1e-4", "1e-5", "1e-6"), "--text_encoder_lr"),
    ):
        with pytest.raises(ValueError, match=said.replace(".", r"\.")):
            train_flux(small_flux, tmp_path / "out", *words)
