"""Whatever kills a run, what lies under a final name is whole, and the run can be continued."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from demo_folder import DemoFolder
from library.train.resume import read_past
from tests.clients.continuing import TinyRuns, equal, tensors
from tests.clients.fork_server import ForkServer
from tests.clients.training import common_words

RUN = "tests.clients.training:run"
WORDS = (
    *("--cache_latents", "--network_train_unet_only", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1"),
    *("--save_every_n_steps", "1", "--save_last_n_steps", "3", "--save_state", "--ema_decay", "0.9"),
)


def whole_files(folder: Path) -> list[Path]:
    """The states of `folder`, in order, after every file under a final name was opened and found whole."""
    networks = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    keys = {frozenset((key, tuple(value.shape)) for key, value in tensors(path).items()) for path in networks}
    assert len(keys) <= 1 and all(len(each) == 576 for each in keys)
    states = sorted(path for path in folder.glob("*-state") if not path.name.startswith("."))
    for state in states:
        assert read_past(state).position.step == int(state.name[10:18])
        assert len(tensors(state / "model.safetensors")) == 576
        assert {path.name for path in state.iterdir()} >= {"optimizer.bin", "scheduler.bin", "ema.safetensors"}
    return states


def state_names(folder: Path) -> set[str]:
    """The states of a run that goes on; their files are not opened, since it may be deleting them."""
    return {path.name for path in folder.glob("*-state") if not path.name.startswith(".")}


def killed_again_and_again(server: ForkServer, runs: TinyRuns, kills: int, longest: float) -> None:
    output, moments = runs.root / "run", random.Random(1)
    words = common_words(runs.demo, output) + runs.words(*WORDS, "--max_train_steps", "1000")
    states: list[Path] = []
    for _ in range(kills):
        process = server.start(RUN, *words, *(("--resume", str(states[-1])) if states else ()))
        time.sleep(moments.uniform(0.2, longest))
        os.kill(process, signal.SIGKILL)
        assert server.wait(process) == -signal.SIGKILL
        states = whole_files(output) if output.exists() else []
    process = server.start(RUN, *words, *(("--resume", str(states[-1])) if states else ()))
    before = {state.name for state in states}
    while state_names(output) <= before:
        time.sleep(0.2)
    os.kill(process, signal.SIGINT)
    assert server.wait(process) == 130
    last = whole_files(output)[-1].name.removesuffix("-state")
    # In a process like the others: another number of threads adds up in another order.
    whole = common_words(runs.demo, runs.root / "whole") + runs.words(*WORDS, "--max_train_steps", str(int(last[10:])))
    assert server.run(RUN, *whole)[0] == 0
    assert equal(runs.weights("whole"), runs.weights("run", last))
    assert equal(runs.weights("whole", "small-ema"), runs.weights("run", f"{last}-ema"))


def test_a_run_that_is_killed_three_times_goes_on_with_equal_bits(
    fork_server: ForkServer, small_sd: DemoFolder, tmp_path: Path
) -> None:
    killed_again_and_again(fork_server, TinyRuns(small_sd, tmp_path), kills=3, longest=3.0)


@pytest.mark.slow
def test_a_run_that_is_killed_thirty_times_goes_on_with_equal_bits(
    fork_server: ForkServer, small_sd: DemoFolder, tmp_path: Path
) -> None:
    killed_again_and_again(fork_server, TinyRuns(small_sd, tmp_path), kills=30, longest=3.0)
