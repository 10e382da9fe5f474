"""A run that was stopped and continued ends with the bits of one that never stopped."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from demo_folder import DemoFolder
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK
from tests.clients.continuing import TinyRuns, equal, tensors
from tests.clients.training import SmallTrainer, common_words
from tests.scripts.test_train_network import command_line, launch

STAND_INS = Path(__file__).resolve().parents[2] / "stand_ins"
"""With a module deepspeed, which the suite does without."""

CACHED = ("--cache_latents", "--network_train_unet_only")
FEATURES = {
    "accumulation, warm-up, cosine, dropout, LoRA+, average": (
        *("--max_train_steps", "5", "--gradient_accumulation_steps", "4", "--ema_decay", "0.8", "--cache_latents"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--network_dropout", "0.2", "--learning_rate", "1e-2"),
        *("--network_args", "loraplus_lr_ratio=4", "rank_dropout=0.2", "module_dropout=0.2"),
    ),
    "schedule-free, worker process": (
        *("--max_train_steps", "5", "--max_data_loader_n_workers", "1", "--network_train_unet_only"),
        *("--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "warmup_steps=2", "--save_precision", "fp16"),
    ),
    "Prodigy, linear": (
        *CACHED,
        *("--max_train_steps", "5", "--optimizer_type", "Prodigy", "--learning_rate", "1", "--lr_scheduler", "linear"),
        *("--optimizer_args", "safeguard_warmup=True", "use_bias_correction=True", "d0=1e-4"),
    ),
    "Adafactor with its own rate": (*CACHED, "--max_train_steps", "5", "--optimizer_type", "Adafactor"),
    "Adafactor with a schedule": (
        *("--cache_latents", "--max_train_steps", "5", "--optimizer_type", "Adafactor", "--scale_weight_norms", "0.5"),
        *("--optimizer_args", "relative_step=False", "scale_parameter=False", "beta1=0.9"),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "5", "--max_grad_norm", "0"),
    ),
    "Adafactor during the backward pass": (
        *("--cache_latents", "--max_train_steps", "5", "--optimizer_type", "Adafactor", "--fused_backward_pass"),
        *("--optimizer_args", "relative_step=False", "--lr_scheduler", "constant_with_warmup", "--ema_decay", "0.8"),
    ),
    "Lion, a schedule class": (
        *(*CACHED, "--max_train_steps", "5", "--optimizer_type", "Lion"),
        *("--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=5"),
    ),
}


@pytest.fixture
def runs(small_sd: DemoFolder, tmp_path: Path) -> Iterator[TinyRuns]:
    fresh_accelerate()
    yield TinyRuns(small_sd, tmp_path)
    fresh_accelerate()


@pytest.fixture(scope="module")
def ended(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """A run `first` of two steps with a state at its end; do not write into it."""
    runs = TinyRuns(small_sd, tmp_path_factory.mktemp("ended"))
    runs.train("first", *CACHED, "--max_train_steps", "2", "--save_state_on_train_end")
    return runs


def fresh_accelerate() -> None:
    """accelerate refuses a second precision in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("words", FEATURES.values(), ids=FEATURES.keys())
def test_a_run_continues_from_a_state_in_its_middle_with_equal_bits(runs: TinyRuns, words: tuple[str, ...]) -> None:
    runs.train("whole", *words, "--save_every_n_steps", "3", "--save_state")
    runs.train("resumed", *words, "--resume", runs.state("whole", "small-step00000003"))
    assert equal(runs.weights("whole"), runs.weights("resumed"))
    if "--ema_decay" in words:
        assert equal(runs.weights("whole", "small-ema"), runs.weights("resumed", "small-ema"))
        assert not equal(runs.weights("whole"), runs.weights("whole", "small-ema"))


def test_saving_and_previews_do_not_change_a_run(runs: TinyRuns) -> None:
    words = ("--cache_latents", "--max_train_steps", "4", "--optimizer_type", "AdamWScheduleFree", "--ema_decay", "0.9")
    runs.train("plain", *words)
    prompts = runs.root / "prompts.txt"
    prompts.write_text("one star --w 64 --h 64 --s 2\n", encoding="utf-8")
    previews = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "3")
    runs.train("busy", *words, "--save_every_n_steps", "1", "--save_state", *previews)
    assert len(list((runs.root / "busy" / "sample").iterdir())) == 1
    assert equal(runs.weights("plain"), runs.weights("busy"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_network_and_state_and_the_run_continues(runs: TinyRuns, number: signal.Signals) -> None:
    words = (*CACHED, "--max_train_steps", "5", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1")
    runs.train("whole", *words)
    assert runs.signalled("stopped", number, 3, *words) == 130
    assert runs.names("stopped") == ["small-step00000004-state", "small-step00000004.safetensors"]
    runs.train("resumed", *words, "--resume", runs.state("stopped", "small-step00000004"))
    assert equal(runs.weights("whole"), runs.weights("resumed"))


def test_a_run_resumed_twice_is_made_longer_and_keeps_its_numbers(runs: TinyRuns, caplog) -> None:
    words = (*CACHED, "--save_every_n_epochs", "1", "--save_every_n_steps", "5", "--gradient_accumulation_steps", "2")
    runs.train("whole", *words, "--max_train_epochs", "3")
    runs.train("first", *words, "--max_train_epochs", "1", "--save_state_on_train_end")
    runs.train("second", *words, "--max_train_steps", "5", "--resume", runs.state("first"), "--save_state")
    with caplog.at_level(logging.WARNING):
        trainer = runs.train("third", *words, "--max_train_epochs", "3", "--resume", runs.state("second"))
    assert "not the one that was saved" not in caplog.text
    assert equal(runs.weights("whole"), runs.weights("third"))
    assert (trainer.state.epoch, trainer.state.step, trainer.state.micro_step) == (3, 9, 18)
    assert trainer.progress.page is not None and trainer.progress.page.facts.first_step == 5
    assert runs.names("second") == [
        "small-state",
        "small-step00000005-state",
        "small-step00000005.safetensors",
        "small.safetensors",
    ]
    assert runs.names("third") == ["small-000002.safetensors", "small.safetensors"]
    record = json.loads((Path(runs.state("second")) / "train_state.json").read_text(encoding="utf-8"))
    assert (record["current_epoch"], record["current_step"], record["finished"]) == (2, 5, True)
    steps = [json.loads(line) for line in (runs.root / "third" / "small.log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in steps if "loss/current" in row] == [6, 7, 8, 9]


def test_the_seed_of_a_run_without_one_is_that_of_its_state(runs: TinyRuns) -> None:
    def without_seed(name: str, *words: str) -> SmallTrainer:
        common = common_words(runs.demo, runs.root / name)
        at = common.index("--seed")
        argv = [*common[:at], *common[at + 2 :], *runs.words(*CACHED, *words)]
        trainer = SmallTrainer(read_settings(TRAIN_NETWORK, "test", argv=argv))
        trainer.train()
        return trainer

    first = without_seed("first", "--save_state", "--save_every_n_steps", "1", "--max_train_steps", "2")
    second = without_seed("second", "--resume", runs.state("first", "small-step00000001"))
    assert first.seed == second.seed
    assert equal(runs.weights("first"), runs.weights("second"))


def test_a_state_holds_the_files_of_the_recorded_names(runs: TinyRuns) -> None:
    runs.train("run", *CACHED, "--max_train_steps", "1", "--save_state_on_train_end", "--ema_decay", "0.5")
    folder = Path(runs.state("run"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "train_state.json",
    ]
    network, saved = runs.weights("run"), tensors(folder / "model.safetensors")
    assert network.keys() == saved.keys() and all(torch.equal(network[key], saved[key]) for key in network)
    assert str(runs.root) not in (folder / "train_state.json").read_text(encoding="utf-8")


def test_what_changed_between_two_runs_is_named(runs: TinyRuns, caplog) -> None:
    words = (*CACHED, "--max_train_steps", "1", "--save_state_on_train_end")
    runs.train("first", *words)
    runs.dataset.write_text(
        runs.dataset.read_text("utf-8").replace("batch_size = 2", "batch_size = 3").replace("0.3", "0.4"), "utf-8"
    )
    more = ("--seed", "8", "--gradient_accumulation_steps", "2", "--min_snr_gamma", "5", "--max_train_steps", "2")
    with caplog.at_level(logging.WARNING):
        runs.train("second", *words, *more, "--resume", runs.state("first"))
    (message,) = [record.getMessage() for record in caplog.records if "not the one that was saved" in record.message]
    assert [line.strip() for line in message.splitlines()[1:]] == [
        "--gradient_accumulation_steps was 1 and is 2",
        "--min_snr_gamma was None and is 5.0",
        "--seed was 7 and is 8",
        "the batch size changed",
        "the settings of the dataset changed",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network_dim", "8"), r"network of another shape.*--network_dim"),
        (("--network_args", "conv_dim=2"), r"network of another shape.*--network_args"),
        (
            ("--optimizer_type", "Lion"),
            "cannot be continued with these settings: --optimizer_type was AdamW and is Lion",
        ),
        (("--network_args", "loraplus_lr_ratio=4"), "the saved optimizer has groups of 1 tensors, .* of 1, 1"),
        (("--max_train_steps", "2"), r"begin after step 2, but it has 2 steps: raise --max_train_steps"),
        (("--resume", "nowhere-state"), "--resume nowhere-state: there is no such folder"),
    ],
)
def test_what_cannot_be_continued_is_an_error(
    runs: TinyRuns, ended: TinyRuns, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runs.train("second", *CACHED, "--max_train_steps", "4", "--resume", ended.state("first"), *words)


def test_a_half_copied_state_is_named(runs: TinyRuns, ended: TinyRuns) -> None:
    shutil.copytree(ended.state("first"), runs.state("first"))
    file = Path(runs.state("first")) / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"--resume .*small-state: optimizer\.bin is cut short or damaged; go on from"):
        runs.train("second", *CACHED, "--max_train_steps", "4", "--resume", runs.state("first"))
    file.unlink()
    with pytest.raises(ValueError, match=r"not a complete state: optimizer\.bin is missing"):
        runs.train("second", *CACHED, "--max_train_steps", "4", "--resume", runs.state("first"))


def test_a_new_rate_holds_from_the_resumed_step_on(runs: TinyRuns) -> None:
    words = (*CACHED, "--lr_scheduler", "linear", "--save_state_on_train_end")
    runs.train("first", *words, "--max_train_steps", "2", "--learning_rate", "1e-3")
    more = ("--max_train_steps", "4", "--learning_rate", "1e-4", "--resume", runs.state("first"))
    trainer = runs.train("second", *words, *more)
    rows = [json.loads(line) for line in (runs.root / "second/small.log.jsonl").read_text("utf-8").splitlines()]
    assert [row["lr/unet"] for row in rows if "lr/unet" in row] == pytest.approx([2.5e-5, 0.0])
    assert trainer.updates.schedule.last_epoch == 4


def test_initial_step_and_epoch_choose_batches_schedule_and_numbers(runs: TinyRuns) -> None:
    words = (*CACHED, "--gradient_accumulation_steps", "4", "--save_every_n_steps", "3", "--lr_scheduler", "linear")
    trainer = runs.train("step", *words, "--max_train_steps", "6", "--initial_step", "3")
    assert (trainer.state.epoch, trainer.state.step, trainer.state.micro_step) == (3, 6, 18)
    assert runs.names("step") == ["small-step00000006.safetensors", "small.safetensors"]
    assert trainer.updates.schedule.last_epoch == 6
    trainer = runs.train("epoch", *words, "--max_train_epochs", "3", "--initial_epoch", "3")
    assert (trainer.state.epoch, trainer.state.step, trainer.state.micro_step) == (3, 6, 18)


FEW_LAYERS = "block_dims=" + ",".join("4" if block in (5, 15) else "0" for block in range(25))
"""A message between the ranks for each tensor takes its time."""

TWO_RANKS = {
    "accumulation, dropout, warm-up, average, workers; SIGTERM for rank 1": (
        *("SIGTERM", "1", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1", "--ema_decay", "0.8"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--max_data_loader_n_workers", "1"),
    ),
    "Adafactor during the backward pass; Ctrl-C for rank 0": (
        *("SIGINT", "0", "--optimizer_type", "Adafactor", "--fused_backward_pass", "--cache_latents"),
        *("--optimizer_args", "relative_step=False", "--network_args", "module_dropout=0.3", FEW_LAYERS),
    ),
    "ZeRO 2 divides the optimizer; SIGTERM for rank 1": (
        *("SIGTERM", "1", "--deepspeed", "--zero_stage", "2", "--ema_decay", "0.8", "--cache_latents"),
        *("--network_args", FEW_LAYERS),
    ),
}


@pytest.fixture(scope="module")
def two_ranks(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyRuns]:
    """The runs of every case, made by the same two processes one after another."""
    found, cases = {}, []
    common = ("--max_train_steps", "5", "--save_every_n_steps", "2", "--save_state", "--network_train_unet_only")
    for name, (number, rank, *more) in TWO_RANKS.items():
        folder = tmp_path_factory.mktemp("two_ranks")
        found[name] = TinyRuns(small_sd, folder)
        words = command_line(small_sd, folder, *found[name].words(*common, *more))
        cases.append([str(folder), number, rank, *words])
    file = tmp_path_factory.mktemp("cases") / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    result = launch(
        str(file),
        script="tests/scripts/two_ranks_resume.py",
        launcher=("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
        + options
        + ("--main_process_port", "0"),
        ACCELERATE_USE_CPU="true",
        PYTHONPATH=str(STAND_INS),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_processes_that_one_signal_stops_continue_with_equal_bits(
    two_ranks: dict[str, TinyRuns], case: str
) -> None:
    runs, more = two_ranks[case], TWO_RANKS[case]
    assert "small.safetensors" not in runs.names("stopped")
    if "--deepspeed" in more:
        assert len(list(Path(runs.state("stopped", "small-step00000003")).glob("optimizer-*-of-2.bin"))) == 2
    for stem in ("small", "small-ema") if "--ema_decay" in more else ("small",):
        for name in ("whole_resumed", "stopped_resumed"):
            assert equal(runs.weights("whole", stem), runs.weights(name, stem)), (name, stem)
