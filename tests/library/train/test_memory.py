"""The memory flags on whole runs of the small Stable Diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from demo_folder import DemoFolder
from library.flags.run import LargeModelFlags
from library.flags.settings import Settings
from library.train.memory import MemoryRoom
from tests.clients.training import SmallTrainer, small_settings, train

ONE_SIZE = """\
[[datasets]]
resolution = 64
caption_extension = ".txt"

  [[datasets.subsets]]
  image_dir = "{pictures}"
"""
UNET = ("--network_train_unet_only", "--sdpa")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Runs of one process may differ in their precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(demo: DemoFolder, output: Path, *words: str) -> dict[str, Tensor]:
    train(demo, output, *words)
    return load_file(output / "small.safetensors")


def test_what_is_recomputed_and_where_it_waits_changes_no_bit_of_the_result(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dataset = tmp_path / "one_size.toml"
    dataset.write_text(ONE_SIZE.format(pictures=small_sd.pictures.as_posix()), encoding="utf-8")
    one_size = ("--dataset_config", str(dataset), "--max_train_steps=3", *UNET)
    expected = trained(small_sd, tmp_path / "plain", *one_size)
    for words in ("--activation_memory=0.002", "--gradient_checkpointing --cpu_offload_checkpointing"):
        found = trained(small_sd, tmp_path / words[:12], *one_size, *words.split())
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    (line,) = [record.getMessage() for record in caplog.records if "activations within" in record.getMessage()]
    assert "of 9 blocks" in line and "recompute all" in line and "keep" in line


def test_a_compiler_that_is_not_there_is_named(small_sd: DemoFolder, tmp_path: Path) -> None:
    settings = small_settings(small_sd, tmp_path, "--torch_compile", "--dynamo_backend=nvprims_nvfuser")
    with pytest.raises(ValueError, match="--dynamo_backend nvprims_nvfuser: this installation of torch has .*inductor"):
        SmallTrainer(settings).start()


@pytest.mark.parametrize(("flag", "text_too"), [("--fp8_base", True), ("--fp8_base_unet", False)])
def test_weights_in_float8_take_a_byte_each_and_the_run_learns_about_the_same(
    small_sd: DemoFolder, tmp_path: Path, flag: str, text_too: bool
) -> None:
    expected = trained(small_sd, tmp_path / "plain", "--mixed_precision=bf16")
    trainer = train(small_sd, tmp_path / "fp8", "--mixed_precision=bf16", flag)
    found = load_file(tmp_path / "fp8" / "small.safetensors")

    def formats(module: torch.nn.Module) -> set[torch.dtype]:
        return {p.dtype for name, p in module.named_parameters() if p.dim() > 1 and "embedding" not in name}

    (encoder,) = trainer.models.text_encoders
    assert formats(trainer.models.denoiser) >= {torch.float8_e4m3fn}
    assert {p.dtype for p in trainer.models.denoiser.parameters() if p.dim() == 1} == {torch.bfloat16}
    assert (torch.float8_e4m3fn in formats(encoder)) == text_too
    ups = [key for key in expected if key.endswith("lora_up.weight") and "unet" in key]
    ours, theirs = (torch.cat([tensors[key].flatten().float() for key in ups]) for tensors in (found, expected))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.7


def test_a_dry_run_knows_what_float8_and_a_budget_for_activations_take(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def sizes(*words: str) -> dict[str, str]:
        caplog.clear()
        caplog.set_level(logging.INFO)
        SmallTrainer(small_settings(small_sd, tmp_path, "--mixed_precision=bf16", *words)).dry_run()
        (table,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory\n")]
        rows = [line.split("  ") for line in table.splitlines()[1:]]
        return {cells[1] if not cells[0] else cells[0]: line for cells, line in zip(rows, table.splitlines()[1:])}

    def number(rows: dict[str, str], name: str) -> float:
        (line,) = [line for line in rows.values() if name in line]
        value, unit = line.split(name)[1].split()[:2]
        return float(value) * {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}[unit]

    base, small = sizes(*UNET), sizes("--fp8_base_unet", "--activation_memory=0.0008", *UNET)
    assert number(small, "denoiser") < 0.56 * number(base, "denoiser")
    assert 0.2 * number(base, "one step") < number(small, "one step") < 0.9 * number(base, "one step")


def test_scales_are_refused_for_a_family_without_transformer_blocks(small_sd: DemoFolder, tmp_path: Path) -> None:
    arch = SmallTrainer.architecture(small_settings(small_sd, tmp_path))
    with pytest.raises(ValueError, match="--fp8_scaled is not for sd models: use --fp8_base"):
        MemoryRoom(Settings.of(LargeModelFlags(fp8_scaled=True)), arch, torch.bfloat16, torch.device("cpu"))
