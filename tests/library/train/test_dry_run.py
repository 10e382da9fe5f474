from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from demo_folder import DemoFolder
from library.files.weights import _SafetensorsFile, open_weights, save_safetensors
from library.flags.output import OutputFlags
from library.train.dry_run import check_output_folder
from library.train.peak_memory import LiveBytes
from library.train.run_sheet import WIDTH
from tests.clients.training import SmallTrainer, small_settings, train


def dry_run(demo: DemoFolder, output: Path, *words: str) -> SmallTrainer:
    trainer = SmallTrainer(small_settings(demo, output, "--dry_run", *words))
    trainer.dry_run()
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def copy_without(demo: DemoFolder, target: Path, part: str) -> str:
    with open_weights(demo.checkpoint) as file:
        tensors = {key: file.read(key) for key in file.keys() if part not in key}
    save_safetensors(tensors, target, {})
    return str(target)


def test_a_dry_run_tells_everything_and_neither_reads_a_weight_nor_writes_a_file(
    small_sd: DemoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_reading(self: object, key: str) -> torch.Tensor:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(_SafetensorsFile, "read", no_reading)
    caplog.set_level(logging.INFO)
    words = ["--sample_prompts", str(small_sd.prompts), "--sample_every_n_epochs", "1", "--max_train_epochs", "3"]
    dry_run(small_sd, tmp_path / "out", *words, "--save_every_n_steps", "10", "--save_last_n_steps", "10")
    text = said(caplog)
    for wanted in (
        "settings in force",
        "*network_dim=4",
        "unet         118,784  384",
        "total optimization steps     36",
        "files that will be written   4, 0.5 MB each; 2 of them stay; 1.0 MB of disk",
        "previews                     3 times 2 pictures",
        "14/75",
        "denoiser",
        "optimizer",
        "a step without content of 2 x",
        "are free main memory",
    ):
        assert wanted in text, wanted
    assert not (tmp_path / "out").exists()
    lines = [line for record in caplog.records if record.filename == "report.py" for line in record.message.split("\n")]
    assert max(len(line) for line in lines if str(tmp_path.parent.parent) not in line) <= WIDTH


def test_the_exit_code_of_a_dry_run_is_that_of_its_first_mistake(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = small_settings(small_sd, tmp_path / "out", "--dry_run")
    assert SmallTrainer(good).run() == 0
    bad = small_settings(small_sd, tmp_path / "out", "--dry_run", "--v2")
    assert SmallTrainer(bad).run() == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.weight", "1 weights are missing"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", "1 weights are missing"),
        ("first_stage_model.", "holds no autoencoder; give one with --vae"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_by_its_header(
    small_sd: DemoFolder, tmp_path: Path, part: str, message: str
) -> None:
    file = copy_without(small_sd, tmp_path / "part.safetensors", part)
    with pytest.raises(ValueError, match=rf"part\.safetensors.*{message}"):
        dry_run(small_sd, tmp_path / "out", "--pretrained_model_name_or_path", file)


def test_a_file_that_is_cut_short_is_named(small_sd: DemoFolder, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(small_sd.checkpoint.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"half\.safetensors is cut short"):
        dry_run(small_sd, tmp_path / "out", "--pretrained_model_name_or_path", str(half))


def test_network_weights_that_do_not_fit_are_named(small_sd: DemoFolder, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_nowhere.lora_down.weight": torch.zeros(4, 8),
        "lora_unet_nowhere.lora_up.weight": torch.zeros(8, 4),
        "lora_unet_nowhere.alpha": torch.tensor(4.0),
    }
    save_safetensors(tensors, tmp_path / "other.safetensors", {})
    for words in (("--network_weights",), ("--dim_from_weights", "--network_weights"), ("--base_weights",)):
        with pytest.raises(ValueError, match=r"lora_unet_nowhere"):
            dry_run(small_sd, tmp_path / "out", *words, str(tmp_path / "other.safetensors"))


def test_weights_of_an_earlier_run_are_taken(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(small_sd, tmp_path / "first", "--max_train_steps", "1")
    first = str(tmp_path / "first" / "small.safetensors")
    trainer = dry_run(small_sd, tmp_path / "out", "--network_weights", first, "--base_weights", first)
    assert len(list(trainer.trained.network.parameters())) == 408


def test_an_output_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--output_dir .*file is a file"):
        check_output_folder(OutputFlags(output_dir=str(tmp_path / "file" / "out")))
    check_output_folder(OutputFlags(output_dir=str(tmp_path / "made" / "later")))
    check_output_folder(OutputFlags(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", [(), ("--gradient_checkpointing",), ("--train_batch_size", "3")])
def test_the_memory_foretold_for_a_step_is_what_it_takes(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, words: tuple[str, ...]
) -> None:
    peaks = []

    class Measured(SmallTrainer):
        def backward(self, batch, completes):  # type: ignore[no-untyped-def]
            with LiveBytes() as count:
                loss = super().backward(batch, completes)
            peaks.append(count.peak)
            return loss

    config = tmp_path / "dataset.toml"
    folder = small_sd.pictures.as_posix()
    config.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"', encoding="utf-8")
    options = ["--dataset_config", str(config), "--cache_latents", "--sdpa", "--caption_extension", ".txt", *words]
    Measured(small_settings(small_sd, tmp_path / "out", *options)).train()
    caplog.set_level(logging.INFO)
    caplog.clear()
    dry_run(small_sd, tmp_path / "out", *options)
    (line,) = [line for line in said(caplog).splitlines() if line.strip().startswith("one step")]
    foretold = float(line.split()[2]) * 1e6 / 1.1
    assert foretold == pytest.approx(max(peaks), rel=0.01, abs=50_000)  # the table shows tenths of a MB
