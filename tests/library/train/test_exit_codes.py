from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from demo_folder import DemoFolder
from library.flags.dataset import CacheFlags, DatasetFlags
from library.flags.run import AttentionFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.train.ending import exit_code_of
from library.train.exit_codes import ExitCode, RunError, from_data, is_out_of_memory, marked
from library.train.out_of_memory import advice, is_of_device
from tests.clients.continuing import TinyRuns
from tests.clients.fork_server import ForkServer
from tests.clients.small_disk import small_disk
from tests.clients.training import SmallTrainer, small_settings


def code_of(error: BaseException, settings: Settings | None = None) -> ExitCode:
    def run() -> None:
        raise error

    return exit_code_of(run, settings or Settings.of())


def last_error(caplog: pytest.LogCaptureFixture) -> str:
    return [record.message for record in caplog.records if record.levelno == logging.ERROR][-1].split("\n")[-1]


def test_each_kind_of_error_has_its_code() -> None:
    assert exit_code_of(lambda: None, Settings.of()) == 0
    assert code_of(ValueError("no")) == 1
    assert code_of(FileNotFoundError("no")) == 1
    assert code_of(RunError("no", ExitCode.DATA)) == 3
    assert code_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == 4
    assert code_of(MemoryError()) == 4
    assert code_of(RunError("no", ExitCode.NOT_FINITE)) == 5
    assert code_of(KeyboardInterrupt()) == 130


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.rstrip().split("\n")[-1]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), AssertionError("ours"), KeyError("ours")])
def test_a_mistake_of_ours_keeps_its_stack_trace(error: Exception) -> None:
    with pytest.raises(type(error)):
        code_of(error)


def test_the_innermost_mark_counts() -> None:
    with pytest.raises(RunError) as caught, marked(ExitCode.DATA), marked(ExitCode.FAILED):
        raise FileNotFoundError("no model.safetensors")
    assert caught.value.code == 1 and str(caught.value) == "no model.safetensors"


def test_an_error_of_ours_is_not_marked() -> None:
    with pytest.raises(AssertionError), marked(ExitCode.DATA):
        raise AssertionError("ours")


def test_only_the_making_of_a_value_is_data() -> None:
    def values():  # type: ignore[no-untyped-def]
        yield 1
        raise ValueError("a.png cannot be read")

    with pytest.raises(RunError, match="a.png"):
        list(from_data(values()))
    with pytest.raises(ValueError, match="in the step") as caught:
        for _ in from_data(values()):
            raise ValueError("in the step")
    assert not isinstance(caught.value, RunError)


def test_below_several_lines_stands_one_with_the_cure(caplog: pytest.LogCaptureFixture) -> None:
    code_of(RunError("2 images cannot be read:\n  a.png\n  b.png", ExitCode.DATA))
    assert last_error(caplog).startswith("images, captions or caches have to be mended first")
    caplog.clear()
    code_of(RunError("a.png cannot be read: repair or remove it", ExitCode.DATA))
    assert last_error(caplog) == "a.png cannot be read: repair or remove it"


@pytest.mark.parametrize(
    ("error", "of_device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), False),
        (MemoryError("Unable to allocate 1.00 GiB for an array"), False),
    ],
)
def test_out_of_memory_is_known_in_every_wording(error: Exception, of_device: bool) -> None:
    assert is_out_of_memory(error) and is_of_device(error) == of_device


def test_advice_names_what_is_not_done_yet_and_what_costs_least_first() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    first = advice(Settings.of(DatasetFlags(train_batch_size=4)), error)
    order = ["--cache_latents", "--sdpa", "--gradient_checkpointing", "AdamW8bit", "train_batch_size", "--network_dim"]
    assert [first.index(word) for word in order] == sorted(first.index(word) for word in order)
    assert first.split("\n")[-1].startswith("out of memory; try this first: --cache_latents")
    done = Settings.of(
        DatasetFlags(train_batch_size=1),
        CacheFlags(cache_latents=True, vae_batch_size=4),
        PrecisionFlags(mixed_precision="bf16"),
        AttentionFlags(sdpa=True),
        MemoryFlags(gradient_checkpointing=True),
    )
    rest = advice(done, error)
    assert "train_batch_size" not in rest and "--sdpa" not in rest and "--gradient_checkpointing" not in rest
    assert rest.split("\n")[-1].startswith("out of memory; try this first: --vae_batch_size=1")


def test_advice_for_main_memory_is_about_main_memory() -> None:
    text = advice(Settings.of(CacheFlags(cache_latents=True)), MemoryError())
    assert "the memory of the machine has run out" in text and "--gradient_checkpointing" not in text
    assert text.split("\n")[-1].startswith("out of memory; try this first: --cache_latents_to_disk")


def test_a_step_without_memory_ends_the_run_with_4(
    small_sd: DemoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(SmallTrainer):
        def update(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert Full(small_settings(small_sd, tmp_path)).run() == 4
    assert last_line(capsys).startswith("out of memory; try this first: --cache_latents")
    assert not list(tmp_path.glob("*.safetensors"))
    page = (tmp_path / "small.report.html").read_text(encoding="utf-8")
    assert '<p class="ending failure">failed: CUDA out of memory. Tried to allocate 2.00 GiB.</p>' in page


def test_settings_that_this_machine_cannot_follow_end_the_run_with_2(
    small_sd: DemoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert SmallTrainer(small_settings(small_sd, tmp_path, "--mixed_precision", "fp16")).run() == 2
    assert "--mixed_precision fp16 needs a GPU" in last_line(capsys)


def test_an_image_that_breaks_during_the_run_is_a_mistake_in_the_data(
    small_sd: DemoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(small_sd.pictures, pictures)
    file = tmp_path / "data.toml"
    text = small_sd.dataset.read_text(encoding="utf-8")
    file.write_text(text.replace(small_sd.pictures.resolve().as_posix(), pictures.as_posix()), encoding="utf-8")

    class Torn(SmallTrainer):
        def run_epochs(self) -> None:
            for path in pictures.glob("*.png"):
                path.write_bytes(path.read_bytes()[:100])
            super().run_epochs()

    words = ("--dataset_config", str(file), "--max_data_loader_n_workers", "0")
    assert Torn(small_settings(small_sd, tmp_path / "out", *words)).run() == 3
    assert "cannot be read: image file is truncated; repair or remove it" in last_line(capsys)


def script(server: ForkServer, demo: DemoFolder, output: Path, *words: str) -> tuple[int, str]:
    """The exit code of train_network.py, and the last line that it says."""
    common = ("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers))
    common += ("--network_module", "networks.lora", "--output_dir", str(output), "--max_train_steps", "40")
    code, said = server.run("train_network.py", *common, *words)
    return code, said.rstrip().split("\n")[-1]


def test_missing_images_end_the_script_with_3(fork_server: ForkServer, small_sd: DemoFolder, tmp_path: Path) -> None:
    code, last = script(fork_server, small_sd, tmp_path, "--train_data_dir", str(tmp_path), "--resolution", "64")
    assert code == 3
    assert f"--train_data_dir {tmp_path}: it has no folder" in last


def test_a_rate_beyond_all_measure_ends_the_script_with_5(
    fork_server: ForkServer, small_sd: DemoFolder, tmp_path: Path
) -> None:
    dataset = TinyRuns(small_sd, tmp_path).dataset
    words = ("--dataset_config", str(dataset), "--learning_rate", "1e30", "--cache_latents", "--seed", "1")
    code, last = script(fork_server, small_sd, tmp_path, *words, "--console_log_simple")
    assert code == 5, last
    assert "not finite" in last and "a learning rate of 1e+30 is high" in last
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--optimizer_type", "AdamX"), 2, "--optimizer_type: torch.optim has no class AdamX; did you mean Adam"),
        (("--optimizer_args", "wait_decay=0.1"), 2, "--optimizer_args: AdamW has no argument wait_decay; did you mean"),
        (("--lr_scheduler_type", "CosineAnealingLR"), 2, "did you mean CosineAnnealingLR?"),
        (("--network_module", "networks.lara"), 1, "--network_module networks.lara: No module named 'networks.lara'"),
    ],
)
def test_a_name_that_is_nothing_ends_the_run_before_anything_is_cached(
    small_sd: DemoFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    class Early(SmallTrainer):
        def load_data(self) -> None:
            raise AssertionError("the run went on")

    assert Early(small_settings(small_sd, tmp_path, *words)).run() == code
    assert message in last_line(capsys)


@pytest.mark.parametrize("flag", ["network_weights", "base_weights"])
def test_a_network_that_is_not_whole_ends_the_run_before_anything_is_cached(
    small_sd: DemoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(small_sd.checkpoint.read_bytes()[:5000])

    class Early(SmallTrainer):
        def load_data(self) -> None:
            raise AssertionError("the run went on")

    assert Early(small_settings(small_sd, tmp_path, f"--{flag}", str(file))).run() == 1
    assert f"--{flag}: {file} is cut short" in last_line(capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of files")
@pytest.mark.parametrize(
    ("words", "largest", "name", "cure"),
    [
        ((), 100_000, "small.safetensors", "--save_precision=fp16"),
        (("--save_model_as", "ckpt"), 100_000, "small.ckpt", "make room"),
        (("--save_state_on_train_end",), 1_000_000, "small-state", "make room"),
    ],
)
def test_a_disk_without_room_is_one_line_with_the_cure_and_harms_no_file(
    small_sd: DemoFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    largest: int,
    name: str,
    cure: str,
) -> None:
    old = tmp_path / "small.safetensors"
    old.write_text("old", encoding="utf-8")
    settings = small_settings(small_sd, tmp_path, "--max_train_steps", "1", "--max_data_loader_n_workers", "0", *words)
    trainer = SmallTrainer(settings)
    with small_disk(largest):
        assert trainer.run() == 1
    line = last_line(capsys)
    assert f"{tmp_path / name} could not be saved: " in line and cure in line
    assert not list(tmp_path.glob(".*"))
    assert (old.read_bytes() == b"old") == (name != "small-state")
    page = (tmp_path / "small.report.html").read_text(encoding="utf-8")
    assert f'<p class="ending failure">failed: {tmp_path / name} could not be saved' in page
    log = (tmp_path / "small.log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["text"].startswith(f"failed: {tmp_path / name} could not be saved")
