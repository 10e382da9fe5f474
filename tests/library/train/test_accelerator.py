from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.amp import GradScaler

from library.flags.run import DistributedFlags, PrecisionFlags, StepFlags
from library.flags.settings import Settings
from library.train.accelerator import (
    HalfGradScaler,
    agreed_seed,
    make_accelerator,
    save_dtype,
    wait_patiently,
    weight_dtype,
)
from library.train.division import Division

pytestmark = pytest.mark.usefixtures("fresh_processes")


def test_precision_and_accumulation_are_those_of_the_flags() -> None:
    settings = Settings.of(PrecisionFlags(mixed_precision="bf16"), StepFlags(gradient_accumulation_steps=4))
    accelerator = make_accelerator(settings)
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.device.type == "cpu"
    assert accelerator.trackers == []


def test_backward_divides_by_the_accumulation_steps() -> None:
    accelerator = make_accelerator(Settings.of(StepFlags(gradient_accumulation_steps=4)))
    weight = nn.Parameter(torch.tensor(1.0))
    accelerator.backward(weight * 2.0)
    assert weight.grad is not None and weight.grad.item() == 0.5


def test_fp16_on_the_cpu_is_an_error_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU.*use bf16 or no"):
        make_accelerator(Settings.of(PrecisionFlags(mixed_precision="fp16")))


def test_a_precision_of_the_launcher_that_does_not_count_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(Settings.of()).mixed_precision == "no"
    assert "launched with mixed precision bf16, but --mixed_precision is no" in caplog.text


def test_a_timeout_for_the_other_processes_is_accepted() -> None:
    assert make_accelerator(Settings.of(DistributedFlags(ddp_timeout=30))).num_processes == 1


def test_dtypes_follow_their_flags() -> None:
    dtypes = [weight_dtype(PrecisionFlags(mixed_precision=name)) for name in ("no", "fp16", "bf16")]
    assert dtypes == [torch.float32, torch.float16, torch.bfloat16]
    assert [save_dtype(name) for name in (None, "float", "fp16", "bf16")] == [
        None,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]


def test_a_given_seed_stays_and_a_drawn_one_is_below_2_to_the_32() -> None:
    make_accelerator(Settings.of())
    assert agreed_seed(7) == 7
    drawn = {agreed_seed(None) for _ in range(4)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_gradients_in_fp16_are_unscaled_only_by_the_scaler_for_them() -> None:
    def gradient(scaler: GradScaler) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler.scale(weight.float().sum()).backward()
        scaler.unscale_(optimizer)
        assert weight.grad is not None
        return weight.grad

    assert gradient(HalfGradScaler("cpu", init_scale=8.0)).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="unscale FP16"):
        gradient(GradScaler("cpu", init_scale=8.0))


def one_rank(rank: int, folder: str) -> None:
    """Gives its part away; then comes back from two waits, of which one is longer than a collective would stand."""
    meeting, filled = Path(folder).joinpath("store").as_uri(), Path(folder, "filled")
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    parts = Division("a flag", 2, rank, torch.device("cpu")).gather({"sum": torch.full((3,), float(rank))})
    for name, content in parts.items():
        content.numpy().tofile(Path(folder, f"{rank} has {name}"))
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    wait_patiently("caches")
    if rank == 1:
        time.sleep(2.5)
        filled.touch()
    wait_patiently("caches")
    Path(folder, f"{rank}.txt").write_text(str(filled.exists()), encoding="utf-8")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found."""
    folder = tmp_path_factory.mktemp("two_ranks")
    start = "fork" if hasattr(os, "fork") else "spawn"
    multiprocessing.start_processes(one_rank, (str(folder),), nprocs=2, start_method=start)
    return folder


def test_ranks_wait_for_the_slowest_however_long_it_takes(two_ranks: Path) -> None:
    assert [(two_ranks / f"{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)] == ["True", "True"]


def test_the_parts_of_all_ranks_come_to_the_first_one(two_ranks: Path) -> None:
    found = sorted(path.name for path in two_ranks.glob("* has *"))
    assert found == ["0 has optimizer-1-of-2.bin", "0 has optimizer-2-of-2.bin"]
    for rank, name in enumerate(found):
        assert torch.load(two_ranks / name, weights_only=True)["sum"].tolist() == [float(rank)] * 3


def test_one_process_waits_for_nobody() -> None:
    wait_patiently("caches")


def test_a_launcher_with_deepspeed_starts_processes_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(Settings.of(StepFlags(gradient_accumulation_steps=2)))
    assert accelerator.distributed_type == "NO" and accelerator.gradient_accumulation_steps == 2
    assert variables.items() <= os.environ.items()


def test_a_launcher_with_fsdp_starts_processes_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = make_accelerator(Settings.of())
    assert accelerator.distributed_type == "NO" and os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert accelerator.state.__dict__.get("fsdp_plugin") is None
