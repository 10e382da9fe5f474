"""train_network.py as it is started: the files it leaves, the ranks it runs on, the mistakes it names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.files.weights import open_weights
from tests.clients.training import train

ROOT = Path(__file__).resolve().parents[2]


def launch(*words: str, script: str = "train_network.py", launcher: tuple[str, ...] = (), **env: str):
    """Run a script of the project in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | env
    command = [sys.executable, *launcher, str(ROOT / script), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")


def command_line(demo, output: Path, *words: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--dataset_config", str(demo.dataset), "--output_dir", str(output), "--output_name", "small"),
        *("--network_module", "networks.lora", "--network_dim", "4", "--learning_rate", "1e-3", "--seed", "3"),
        *("--max_train_steps", "2", *words),
    ]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        return {key: file.read(key) for key in file.keys()}


def test_two_processes_train_and_end_with_equal_weights(small_sd, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    result = launch(
        *command_line(small_sd, tmp_path, "--cache_latents", "--network_dropout", "0.1"),
        script="tests/scripts/two_ranks.py",
        launcher=launcher + options + ("--main_process_port", "0"),
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"number of processes +2\b", result.stderr + result.stdout)
    first, second = tensors(tmp_path / "rank0.safetensors"), tensors(tmp_path / "rank1.safetensors")
    assert first.keys() == second.keys() and len(first) == 612
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(key.endswith("lora_up.weight") and value.abs().max() > 0 for key, value in first.items())


def test_a_run_leaves_its_files_and_log_under_the_usual_names(small_sd, tmp_path):
    words = ["--max_train_epochs", "2", "--save_every_n_epochs", "1", "--save_every_n_steps", "10"]
    words += ["--sample_prompts", str(small_sd.prompts), "--sample_every_n_epochs", "2", "--network_train_unet_only"]
    words += ["--logging_dir", str(tmp_path / "logs"), "--log_prefix", "run_", "--cache_latents", "--sdpa"]
    words += ["--save_precision", "fp16", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    result = launch(*command_line(small_sd, tmp_path / "out", *words))
    assert result.returncode == 0, result.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        *("sample", "small-000001.safetensors", "small-step00000010.safetensors"),
        *("small.log.jsonl", "small.report.html", "small.safetensors"),
    ]
    samples = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert [name[:17] for name in samples] == ["small_e000002_00_", "small_e000002_01_"]
    with Image.open(tmp_path / "out" / "sample" / samples[1]) as image:
        assert image.size == (256, 128)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("run_20")
    log = (tmp_path / "out" / "small.log.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    steps = [row["step"] for row in rows if "loss/current" in row]
    assert steps == list(range(1, 13))  # 12 batches an epoch, two to an update, two epochs
    assert [row["step"] for row in rows if row.get("event") == "preview"] == [12]
    assert any(path.name.startswith("events.out.tfevents") for path in folder.rglob("*"))
    assert "steps: 100%" in result.stderr and "avr_loss=" in result.stderr
    with open_weights(tmp_path / "out" / "small.safetensors") as file:
        assert all(file.dtype(key) == torch.float16 for key in file.keys())
        assert not any(key.startswith("lora_te") for key in file.keys())
        assert (file.metadata["ss_steps"], file.metadata["ss_epoch"]) == ("12", "2")
        assert file.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_equal_seeds_give_equal_files_whatever_the_caches_and_workers(small_sd, tmp_path):
    def trained(name: str, *words: str) -> dict[str, torch.Tensor]:
        train(small_sd, tmp_path / name, *words)
        return tensors(tmp_path / name / "small.safetensors")

    memory = trained("memory", "--cache_latents")
    again = trained("again", "--cache_latents", "--gradient_checkpointing")
    assert memory.keys() == again.keys()
    for key in memory:
        torch.testing.assert_close(memory[key], again[key], atol=1e-6, rtol=1e-5)
    other = trained("other", "--cache_latents", "--seed", "8")
    assert any(not torch.equal(memory[key], other[key]) for key in memory)
    live = trained("live", "--max_data_loader_n_workers", "0")
    workers = trained("workers", "--max_data_loader_n_workers", "1")
    assert all(torch.equal(live[key], workers[key]) for key in live)


def truncated(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes()[:-1000])
    return target


def broken_pictures(demo, folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    (folder / "good.txt").write_text("a red square", encoding="utf-8")
    (folder / "broken.png").write_bytes(next(demo.pictures.glob("*.png")).read_bytes()[:60])
    (folder / "broken.txt").write_text("half a picture", encoding="utf-8")
    config = folder / "dataset.toml"
    config.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n', encoding="utf-8"
    )
    return config


def test_a_truncated_checkpoint_is_named(small_sd, tmp_path):
    file = truncated(small_sd.checkpoint, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors.*(truncated|cut|incomplete|short)"):
        train(small_sd, tmp_path / "out", "--pretrained_model_name_or_path", str(file))


def test_a_contradicting_v2_is_named(small_sd, tmp_path):
    with pytest.raises(ValueError, match="--v2"):
        train(small_sd, tmp_path / "out", "--v2")


def test_a_lora_in_the_place_of_the_model_is_named(small_sd, tmp_path):
    train(small_sd, tmp_path / "out")
    lora = tmp_path / "out" / "small.safetensors"
    with pytest.raises(ValueError, match=r"small\.safetensors.*LoRA"):
        train(small_sd, tmp_path / "again", "--pretrained_model_name_or_path", str(lora))


def test_a_corrupt_picture_is_named_before_anything_is_loaded(small_sd, tmp_path):
    config = broken_pictures(small_sd, tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train(small_sd, tmp_path / "out", "--dataset_config", str(config))
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_network_weights(small_sd, tmp_path):
    train(small_sd, tmp_path / "first", "--learning_rate", "1e-2")
    first = tmp_path / "first" / "small.safetensors"
    train(
        small_sd, tmp_path / "second", "--network_weights", str(first), "--dim_from_weights", "--learning_rate", "1e-12"
    )
    before, after = tensors(first), tensors(tmp_path / "second" / "small.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(before[key], after[key], atol=1e-6, rtol=0)


def test_merged_base_weights_act_like_the_network_they_came_from(small_sd, tmp_path):
    train(small_sd, tmp_path / "first", "--learning_rate", "1e-2")
    first = str(tmp_path / "first" / "small.safetensors")
    plain = train(small_sd, tmp_path / "plain", "--learning_rate", "1e-12")
    merged = train(small_sd, tmp_path / "merged", "--learning_rate", "1e-12", "--base_weights", first)
    adapted = train(
        small_sd, tmp_path / "adapted", "--learning_rate", "1e-12", "--network_weights", first, "--dim_from_weights"
    )
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])

    @torch.no_grad()
    def answer(trainer):
        text = trainer.arch.encode_text(trainer.models.text_encoders, trainer.arch.tokenize(["a star"]))
        return trainer.models.denoiser(x, t, text["context"])

    assert (answer(merged) - answer(plain)).abs().max() > 1e-2
    torch.testing.assert_close(answer(merged), answer(adapted), atol=2e-4, rtol=2e-4)


def test_weight_norms_are_held_below_the_limit(small_sd, tmp_path):
    trainer = train(
        small_sd, tmp_path, "--learning_rate", "1e-1", "--scale_weight_norms", "0.05", "--max_train_steps", "3"
    )
    _, _, largest = trainer.trained.network.apply_max_norm_regularization(1e9)
    assert 0 < largest <= 0.05 * (1 + 1e-5)
    assert trainer.trained.norms()["max_norm/keys_scaled"] > 0
