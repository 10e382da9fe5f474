from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo_folder import DemoFolder
from library.data.items import Batch
from library.flags.output import OutputFlags
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.train.exit_codes import RunError
from library.train.flat_parameters import FlatParameters
from library.train.state import Models, ParameterGroups
from library.train.watch import FIRST_LOOK, Watch, newest_file
from tests.clients.continuing import TinyRuns
from tests.clients.training import SmallTrainer, small_settings


@pytest.fixture(scope="module")
def runs(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(small_sd, tmp_path_factory.mktemp("watch"))


class Broken(SmallTrainer):
    """A run some of whose losses are not numbers."""

    bad: frozenset[int] = frozenset()

    def start_batch(self) -> bool:
        return self.state.micro_step in self.bad

    def build_trainable(self) -> Any:
        trained = super().build_trainable()
        predict = self.arch.predict
        self.arch.predict = lambda *words: predict(*words) * (math.nan if self.start_batch() else 1.0)  # type: ignore[method-assign]
        return trained


def broken_run(runs: TinyRuns, name: str, bad: Sequence[int], *words: str) -> int:
    """The exit code of a run whose batches `bad`, 0 for the first, have losses that are not numbers."""
    trainer = Broken(small_settings(runs.demo, runs.root / name, *runs.words("--max_train_steps", "9", *words)))
    trainer.bad = frozenset(bad)
    return trainer.run()


def small_watch(rate: float = 1e-4, most: int = 3, folder: Path = Path(".")) -> tuple[Watch, nn.Linear, nn.Linear]:
    """A watch over a layer of ones and one of zeros."""
    down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    nn.init.ones_(down.weight)
    nn.init.zeros_(up.weight)
    groups = ParameterGroups([{"params": [down.weight, up.weight], "lr": rate}], ["unet"])
    flat = FlatParameters(groups.groups)
    optimizer = torch.optim.SGD(flat.optimizer_groups(True), lr=rate)
    settings = Settings.of(StrictFlags(max_nonfinite_steps=most), OutputFlags(output_dir=str(folder), output_name="n"))
    return Watch(settings, None, Models([], nn.Identity()), groups, flat.values, optimizer), down, up  # type: ignore[arg-type]


def batch(name: str, latents: Tensor | None = None) -> Batch:
    return Batch(["a"], torch.ones(1), latents=latents, paths=[f"pictures/{name}.png"])


def see(watch: Watch, losses: Sequence[float], latents: Tensor | None = None) -> None:
    for step, loss in enumerate(losses, 1):
        watch.add_batch(batch(f"p{step}", latents), [torch.tensor([step * 100])], step, torch.tensor(loss))


def test_the_run_ends_at_the_third_loss_in_a_row_that_is_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    watch, _, _ = small_watch()
    with pytest.raises(
        RunError, match=r"loss was not finite 3 times in a row .* step 5 at timestep 500, images: "
    ) as e:
        see(watch, [0.1, 0.2, math.nan, math.inf, math.nan, 0.1])
    assert e.value.code == 5 and "pictures/p5.png" in str(e.value)
    said = [record.message for record in caplog.records]
    assert said == ["the loss is nan: step 3 at timestep 300, images: pictures/p3.png"]


def test_losses_that_recover_go_on() -> None:
    watch, _, _ = small_watch()
    see(watch, [math.nan, math.nan, 0.1] * 4)


def test_fewer_are_enough_when_asked() -> None:
    watch, _, _ = small_watch(most=1)
    with pytest.raises(RunError, match="1 times in a row"):
        see(watch, [math.nan, 0.1])


def test_gradients_are_seen_too_unless_a_scaler_does() -> None:
    watch, _, _ = small_watch(most=2)
    for step in range(1, 4):
        watch.add_batch(batch("g"), [], step, torch.tensor(0.1))
        watch.add_gradient(torch.tensor(math.inf), is_scaled=True)
    with pytest.raises(RunError, match=r"gradient was not finite 2 times .* step 5, images: pictures/g.png"):
        for step in range(4, 9):
            watch.add_batch(batch("g"), [], step, torch.tensor(0.1))
            watch.add_gradient(torch.tensor(math.inf), is_scaled=False)


def test_the_cause_is_the_image_whose_latents_are_broken() -> None:
    watch, _, _ = small_watch(most=1)
    with pytest.raises(RunError, match="cached latents of p1.png are not finite: delete their cache and use --no_half"):
        see(watch, [math.nan, 0.1], latents=torch.full((1, 4, 2, 2), math.nan))


def test_the_cause_is_a_rate_that_is_high() -> None:
    watch, _, _ = small_watch(rate=0.1, most=1)
    with pytest.raises(RunError, match="a learning rate of 0.1 is high"):
        see(watch, [math.nan, 0.1])


def test_weights_that_are_not_finite_are_not_saved() -> None:
    watch, _, up = small_watch()
    watch.refuse_broken_weights()
    with torch.no_grad():
        up.weight[0, 0] = math.inf
    with pytest.raises(RunError, match="weights are not finite, so they are not saved; no file was saved before") as e:
        watch.refuse_broken_weights()
    assert e.value.code == 5


def test_the_last_good_file_is_named(tmp_path: Path) -> None:
    flags = OutputFlags(output_dir=str(tmp_path), output_name="n")
    for age, name in enumerate(["n-000002", "n-step00000010", "n2", "n"]):
        (tmp_path / f"{name}.safetensors").touch()
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))
    assert newest_file(flags, since=0) == tmp_path / "n-000002.safetensors"
    assert newest_file(flags, since=1001) is None


def test_weights_that_stay_at_zero_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, down, _ = small_watch()
    with torch.no_grad():
        down.weight.add_(1)  # movement of what does not begin at zero is no sign of life
    for step in range(1, 2 * FIRST_LOOK):
        watch.finish_update(step)
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("after step 20 nothing has been learnt in parameter group unet: no gradient reaches it")


def test_a_rate_of_zero_is_said_to_be_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    watch, _, _ = small_watch(rate=0.0)
    for step in range(1, FIRST_LOOK + 1):
        watch.finish_update(step)
    assert "its learning rate is 0" in caplog.text


def test_weights_that_grow_tenfold_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, down, up = small_watch()
    with torch.no_grad():
        up.weight.fill_(0.1)
    for step in range(1, 111):
        if step == 40:
            with torch.no_grad():
                down.weight.fill_(30.0)
        watch.finish_update(step)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "by step 100 the weights have grown to 30 times their norm" in said[0]


def test_memory_that_grows_with_every_epoch_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, _, _ = small_watch()
    for gigabytes in (2.0, 4.0, 5.0, 6.0, 7.0, 8.0):
        watch.finish_epoch({"memory/process_gb": gigabytes, "memory/device_gb": 3.0})
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "main memory grows from epoch to epoch: 4.0, 5.0, 6.0, 7.0 GB after the last 4" in said[0]


@pytest.mark.parametrize("sizes", [(9, 9, 8, 9, 9, 9), (2, 6, 6, 6, 6, 6), (5.0, 5.1, 5.11, 5.12, 5.13, 5.14)])
def test_memory_that_levels_off_is_not_named(caplog: pytest.LogCaptureFixture, sizes: Sequence[float]) -> None:
    watch, _, _ = small_watch()
    for size in sizes:
        watch.finish_epoch({"memory/process_gb": size})
    assert not caplog.records


def test_a_sound_run_is_left_alone(runs: TinyRuns, caplog: pytest.LogCaptureFixture) -> None:
    schedule = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "100")
    runs.train("sound", "--max_train_steps", str(FIRST_LOOK + 1), "--cache_latents", *schedule)
    assert not [record.message for record in caplog.records if record.filename == "watch.py"]


def test_one_broken_batch_does_not_break_the_weights(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert broken_run(runs, "one", [3]) == 0
    assert "the loss is nan: step 4 at timestep" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in runs.weights("one").values())


def test_a_run_of_broken_batches_ends_and_keeps_the_last_good_file(
    runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broken_run(runs, "many", range(4, 9), "--save_every_n_steps", "4") == 5
    assert runs.names("many") == ["small-step00000004.safetensors"]
    last = capsys.readouterr().err.rstrip().split("\n")[-1]
    assert "the loss was not finite 3 times in a row (--max_nonfinite_steps), last in step 7 at timestep" in last
    assert "the last good file is " in last and "small-step00000004.safetensors" in last and "Likely cause" in last
    for name in runs.names("many"):
        stem = name.removesuffix(".safetensors")
        assert all(value.isfinite().all() for value in runs.weights("many", stem).values())


def test_without_clipping_broken_weights_are_never_written(runs: TinyRuns) -> None:
    words = ("--max_grad_norm", "0", "--max_nonfinite_steps", "99", "--save_every_n_steps", "3")
    assert broken_run(runs, "unclipped", [4], *words) == 5
    assert runs.names("unclipped") == ["small-step00000003.safetensors"]
