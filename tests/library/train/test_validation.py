from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo_folder import DemoFolder
from library.data.items import Batch
from library.diffusion.ddpm import DDPM
from library.diffusion.process import Draws
from library.flags.monitor import ValidationFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.train.log_file import read_log
from library.train.step import condition_of, step_loss
from library.train.validation import (
    HeldOutOrder,
    ImageLoss,
    Measurement,
    Validation,
    noise_seed,
    noised_rows,
    validation_timesteps,
)
from tests.clients.continuing import TinyRuns, equal
from tests.clients.launcher import TWO_PROCESSES, said_by
from tests.clients.training import SmallTrainer, small_settings

SPLIT = ("--validation_split", "0.3", "--max_train_epochs", "2", "--cache_latents")


@pytest.fixture(scope="module")
def runs(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(small_sd, tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def validated(runs: TinyRuns) -> SmallTrainer:
    return runs.train("validated", *SPLIT, "--validate_every_n_steps", "3")


def logged(runs: TinyRuns, name: str) -> list[dict[str, Any]]:
    return list(read_log(runs.root / name / "small.log.jsonl", before=10**9))


def judge(losses: list[float], patience: int | None = None) -> tuple[Validation, list[bool]]:
    """A validation that has seen `losses`, and which of them were the best so far."""
    settings = Settings.of(ValidationFlags(early_stop_patience=patience), NoiseFlags(), StrictFlags())
    validation = Validation(settings, None, None, None, 0, None)  # type: ignore[arg-type]
    found = [Measurement(step, (200,), (ImageLoss("a", (loss,)),)) for step, loss in enumerate(losses, 1)]
    return validation, [validation.judge(one) for one in found]


def test_the_points_are_the_inner_ones_of_the_range_of_training() -> None:
    assert validation_timesteps(NoiseFlags()) == (200, 400, 600, 800)
    assert validation_timesteps(NoiseFlags(min_timestep=500)) == (600, 700, 800, 900)
    assert validation_timesteps(NoiseFlags(max_timestep=100)) == (20, 40, 60, 80)


def test_each_row_is_noised_alike_whatever_else_is_in_the_batch() -> None:
    process = DDPM(NoiseFlags(noise_offset=0.1), LossFlags(), v_parameterization=False)
    latents = torch.randn(3, 4, 8, 8)
    together = noised_rows(process, latents, [Draws.seeded(seed) for seed in (1, 2, 3)], 400)
    alone = noised_rows(process, latents[2:], [Draws.seeded(3)], 400)
    assert torch.equal(together.x[2:], alone.x) and torch.equal(together.noise[2:], alone.noise)
    assert together.t.tolist() == [400, 400, 400]
    assert not torch.equal(together.noise[0], together.noise[1])


def test_the_noise_depends_on_seed_image_and_timestep() -> None:
    seeds = {noise_seed(s, name, t) for s in (1, 2) for name in ("a.png", "b.png") for t in (-1, 200, 400)}
    assert len(seeds) == 12


def test_averages_are_over_images_and_timesteps() -> None:
    images = (ImageLoss("b", (0.5, 0.9)), ImageLoss("a", (0.1, 0.3)))
    found = Measurement(7, (200, 400), images)
    assert found.average == pytest.approx(0.45)
    assert found.at_timesteps() == {"t200": pytest.approx(0.3), "t400": pytest.approx(0.6)}
    assert found.rows()[0] == {"image": "b", "loss": pytest.approx(0.7), "t200": 0.5, "t400": 0.9}


def test_only_a_lower_loss_is_the_best() -> None:
    validation, best = judge([0.5, 0.6, 0.4, 0.4, math.nan])
    assert best == [True, False, True, False, False]
    assert (validation.best_loss, validation.best_step, validation.since_best) == (0.4, 3, 2)


def test_the_run_ends_when_patience_does() -> None:
    assert not judge([0.5, 0.6], patience=2)[0].ends_run
    assert judge([0.5, 0.6, 0.5], patience=2)[0].ends_run
    assert not judge([0.5, 0.6, 0.5])[0].ends_run


def test_a_resumed_run_knows_the_best_loss_and_how_long_ago_it_was() -> None:
    before, _ = judge([0.5, 0.4, 0.6], patience=2)
    after, _ = judge([], patience=2)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.best_loss, after.best_step, after.last_step, after.since_best) == (0.4, 2, 3, 1)
    fresh, _ = judge([])
    fresh.load_state_dict(json.loads(json.dumps(fresh.state_dict())))
    assert fresh.best_loss == math.inf


def test_flags_without_held_out_images_are_named(caplog: pytest.LogCaptureFixture) -> None:
    judge([], patience=3)
    assert "no effect without held-out images: --early_stop_patience" in caplog.text
    settings = Settings.of(ValidationFlags(validate_every_n_steps=2), NoiseFlags(), StrictFlags(strict=True))
    with pytest.raises(ValueError, match="--validate_every_n_steps; hold some out with --validation_split"):
        Validation(settings, None, None, None, 0, None)  # type: ignore[arg-type]


def test_the_loss_is_that_of_single_images_computed_by_hand(validated: SmallTrainer) -> None:
    validation = validated.validation
    measured = validation.measured(validated.models, validated.trained, 99)
    assert len(measured.images) == 3
    order = validation.loader.order
    batches = [replace(request, items=(i,), draws=(0,)) for request in order.requests(1, 0) for i in request.items]
    expected = {}
    for module in (validated.models.denoiser, *validated.models.text_encoders, validated.trained.network):
        module.eval()
    for request in batches:
        batch: Batch = validated.data.validation[request]  # type: ignore[index]
        name = Path(batch.paths[0]).name
        with torch.no_grad():
            expected[batch.paths[0]] = [
                float(loss_at(validated, batch, t, noise_seed(7, name, t))) for t in (200, 400, 600, 800)
            ]
    for image in measured.images:
        assert list(image.losses) == pytest.approx(expected[image.path], rel=1e-4)
    assert measured.average == pytest.approx(sum(map(sum, expected.values())) / 12, rel=1e-4)


def loss_at(trainer: SmallTrainer, batch: Batch, t: int, seed: int) -> torch.Tensor:
    """Mean squared error of the answer to one noisy image, written out."""
    assert batch.latents is not None
    latents = batch.latents * 0.18215
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    a = DDPM(NoiseFlags(), LossFlags(), v_parameterization=False).alphas_cumprod[t]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    cond = condition_of(batch, trainer.arch, trainer.models, False)
    answer = trainer.arch.predict(trainer.models.denoiser, noisy, torch.tensor([t]), cond)
    return ((answer.float() - noise) ** 2).mean()


def test_two_validations_of_the_same_weights_are_equal(validated: SmallTrainer) -> None:
    validation = validated.validation
    found = []
    for step in (101, 102):
        torch.randn(5)  # what the training draws makes no difference
        found.append(validation.measured(validated.models, validated.trained, step).images)
    assert found[0] == found[1]


def test_validation_leaves_modes_and_random_numbers_alone(validated: SmallTrainer) -> None:
    network = validated.trained.network
    network.train()
    before = torch.get_rng_state()
    validated.validation.measured(validated.models, validated.trained, 103)
    assert network.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in network.parameters())


def test_captions_of_held_out_images_do_not_change(validated: SmallTrainer) -> None:
    data = validated.data.validation
    assert data is not None
    captions = {
        data[replace(request, draws=tuple(range(i, i + len(request.items))))].captions[0]
        for request in validated.validation.loader.order.requests(1, 0)[:1]
        for i in range(8)
    }
    assert len(captions) == 1 and captions != {""}


def test_training_is_the_same_with_and_without_validation(runs: TinyRuns, validated: SmallTrainer) -> None:
    runs.train("rarely", *SPLIT, "--validate_every_n_epochs", "50")
    assert equal(runs.weights("validated"), runs.weights("rarely"))
    assert "small-best.safetensors" not in runs.names("rarely")


def test_every_validation_is_in_the_log_with_its_timesteps_and_images(runs: TinyRuns, validated: SmallTrainer) -> None:
    rows = logged(runs, "validated")
    by_step = {row["step"]: row for row in rows if "loss/validation/step_average" in row}
    by_epoch = {row["step"]: row for row in rows if "loss/validation/epoch_average" in row}
    steps = validated.plan.steps
    assert list(by_step) == list(range(3, steps + 1, 3))
    assert list(by_epoch) == [steps // 2, steps]
    names = {f"loss/validation/t{t}" for t in (200, 400, 600, 800)}
    for row in (*by_step.values(), *by_epoch.values()):
        kind = "step" if "loss/validation/step_average" in row else "epoch"
        average, divergence = row[f"loss/validation/{kind}_average"], row[f"loss/validation/{kind}_divergence"]
        assert names <= row.keys()
        assert sum(row[name] for name in names) / 4 == pytest.approx(average)
        assert divergence != average
    tables = [row for row in rows if row.get("table") == "validation"]
    assert len(tables) == len(by_step) + len(by_epoch)
    losses = [line["loss"] for line in tables[-1]["rows"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert sum(losses) / 3 == pytest.approx(by_epoch[steps]["loss/validation/epoch_average"])


def test_the_best_file_holds_the_weights_of_the_lowest_loss(runs: TinyRuns) -> None:
    class Chosen(SmallTrainer):
        def validate(self, occasion: str, epoch: int) -> None:
            found, step = self.validation, self.state.step
            loss = {2: 0.5, 4: 0.3, 6: 0.4}.get(step, 0.9)
            found.last = Measurement(step, found.timesteps, (ImageLoss("a", (loss,) * 4),))
            super().validate(occasion, epoch)

    words = runs.words(*SPLIT, "--validate_every_n_steps", "2", "--save_every_n_steps", "2")
    Chosen(small_settings(runs.demo, runs.root / "chosen", *words)).train()
    best = runs.weights("chosen", "small-best")
    assert equal(best, runs.weights("chosen", "small-step00000004"))
    assert not equal(best, runs.weights("chosen"))


def test_early_stop_ends_with_the_last_file(runs: TinyRuns, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = ("--learning_rate", "3e-1", "--validate_every_n_steps", "1", "--early_stop_patience", "2")
    trainer = runs.train("stopped", *SPLIT, "--max_train_epochs", "9", *words)
    validation = trainer.validation
    assert trainer.state.step < trainer.plan.steps
    assert trainer.state.step == validation.best_step + 2
    assert runs.names("stopped") == ["small-best.safetensors", "small.safetensors"]
    assert "has not fallen for 2 validations (--early_stop_patience)" in caplog.text


def test_a_run_that_goes_on_from_a_state_goes_on_with_the_best_loss(runs: TinyRuns, validated: SmallTrainer) -> None:
    words = (*SPLIT, "--validate_every_n_steps", "3")
    runs.train("half", *words, "--max_train_epochs", "1", "--save_state_on_train_end")
    rest = runs.train("rest", *words, "--resume", runs.state("half")).validation
    assert rest.state_dict() == validated.validation.state_dict()
    assert equal(runs.weights("validated"), runs.weights("rest"))


def test_only_the_first_batches_count_with_max_validation_steps(runs: TinyRuns) -> None:
    words = ("--dataset_config", str(runs.dataset), "--validation_split", "0.5", "--max_train_epochs", "1")
    trainer = runs.train("few", *words, "--max_validation_steps", "2", "--train_batch_size", "1")
    assert trainer.validation.last is not None
    sizes = [len(request.items) for request in trainer.validation.loader.order.requests(1, 0)]
    assert len(sizes) == 2 and len(trainer.validation.last.images) == sum(sizes)


def test_two_ranks_find_what_one_finds(runs: TinyRuns) -> None:
    # With a rate of next to nothing both runs judge the same weights.
    words = runs.words(*SPLIT, "--learning_rate", "1e-20", "--max_train_epochs", "1", "--train_batch_size", "1")
    common = ["--pretrained_model_name_or_path", str(runs.demo.checkpoint), "--network_module", "networks.lora"]
    common += ["--tokenizer_cache_dir", str(runs.demo.tokenizers), "--output_name", "small", "--seed", "7"]
    common += ["--network_dim", "4", "--output_dir", str(runs.root / "two")]
    said_by(*TWO_PROCESSES, "train_network.py", *common, *words)
    runs.train("one", *words[2:])
    two, one = (
        {line["image"]: line for row in logged(runs, name) if row.get("table") == "validation" for line in row["rows"]}
        for name in ("two", "one")
    )
    assert two.keys() == one.keys() and len(one) == 3
    for image, line in one.items():
        assert {key: two[image][key] for key in line if key != "image"} == pytest.approx(
            {key: value for key, value in line.items() if key != "image"}, rel=1e-5
        )


def test_ranks_in_step_judge_equally_many_batches_and_count_each_once(validated: SmallTrainer) -> None:
    assert validated.validation.held_out is not None
    order = HeldOutOrder(validated.validation.held_out, 1)
    planned = order.requests(1, 0)
    for world_size in (2, 3, 4, 5):
        ranks = [replace(order, rank=rank, world_size=world_size, in_step=True) for rank in range(world_size)]
        made = [rank.requests(1, 0) for rank in ranks]
        assert {len(requests) for requests in made} == {-(-len(planned) // world_size)}
        counted = [one for rank, requests in zip(ranks, made, strict=True) for one in requests[: rank.num_counted]]
        assert sorted(counted, key=planned.index) == planned


def test_the_multipliers_of_a_batch_end_with_it(validated: SmallTrainer) -> None:
    trained = validated.trained
    batch = SimpleNamespace(network_multipliers=torch.tensor([0.5, 0.5]))
    trained.start_step(batch, 1)  # type: ignore[arg-type]
    assert trained.network.strength.rows.tolist() == [0.5, 0.5]
    trained.start_step(SimpleNamespace(network_multipliers=None), 2)  # type: ignore[arg-type]
    assert (trained.network.strength.rows, trained.network.strength.multiplier) == (None, 1.0)


def test_step_loss_is_the_mean_over_the_images(validated: SmallTrainer) -> None:
    batch = next(iter(validated.loader.epoch(1, 0)))
    with torch.no_grad():
        both = step_loss(batch, validated.arch, validated.models, validated.trained, Draws.seeded(1), t=300)
    assert both.ndim == 0 and 0 < float(both) < 5
