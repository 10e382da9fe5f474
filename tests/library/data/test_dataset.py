"""The order of an epoch, and what stands in a batch."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import PlannedBatch, TrainingSet, load_training_set
from library.data.items import BatchRequest

Load = Callable[..., TrainingSet]


def request(planned: PlannedBatch, **changes: float) -> BatchRequest:
    values = {"epoch": 1, "step": 0, "total_steps": 10, **changes}
    return BatchRequest(planned.dataset, planned.items, planned.draws, **values)  # type: ignore[arg-type]


def test_an_epoch_holds_every_image_its_repeats_and_never_mixes_buckets(training_set: Load) -> None:
    data = training_set(num_repeats=3, batch_size=4)
    for epoch in (1, 2, 3):
        planned = data.epoch_batches(7, epoch)
        assert Counter(item for batch in planned for item in batch.items) == dict.fromkeys(range(9), 3)
        assert len(planned) == data.num_batches == 9  # three buckets of nine in batches of four
        for batch in planned:
            assert len({data.datasets[0].items[item].bucket for item in batch.items}) == 1
        draws = [draw for batch in planned for draw in batch.draws]
        assert len(set(draws)) == 27


def test_the_order_depends_on_seed_and_epoch_alone(training_set: Load) -> None:
    one, two = training_set(), training_set()
    assert one.epoch_batches(5, 2) == two.epoch_batches(5, 2)
    orders = [one.epoch_batches(seed, epoch) for seed in (1, 2) for epoch in (1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_draws_of_an_image_do_not_depend_on_its_batch(training_set: Load) -> None:
    def draws(batch_size: int) -> dict[int, int]:
        planned = training_set(batch_size=batch_size).epoch_batches(5, 2)
        return {item: draw for batch in planned for item, draw in zip(batch.items, batch.draws, strict=True)}

    assert draws(1) == draws(4)


def test_a_batch_holds_pixels_captions_sizes_and_names(training_set: Load, folder: Path) -> None:
    data = training_set(captions=CaptionSettings(), batch_size=3)
    for planned in data.epoch_batches(1, 1):
        batch = data[request(planned, epoch=4, step=9)]
        items = [data.datasets[0].items[index] for index in planned.items]
        width, height = items[0].bucket
        assert batch.pixels is not None and batch.pixels.shape == (3, 3, height, width)
        assert batch.pixels.dtype == torch.uint8
        numbers = batch.to(torch.device("cpu")).pixels
        assert numbers is not None and numbers.dtype == torch.float32 and -1 <= numbers.min() < numbers.max() <= 1
        assert batch.latents is None and batch.network_multipliers is None and batch.keep_prior == ()
        assert batch.captions == [f"subject {item.path.stem}, red, round, small" for item in items]
        assert batch.paths == [str(item.path) for item in items]
        assert batch.sizes is not None
        assert batch.sizes.original.tolist() == [[item.size[1], item.size[0]] for item in items]
        assert batch.sizes.target.tolist() == [[height, width]] * 3
        assert (batch.epoch, batch.step) == (4, 9)
        assert batch.loss_weights.tolist() == [1, 1, 1]


def test_a_batch_that_only_keeps_step_has_no_weight(training_set: Load) -> None:
    data = training_set()
    planned = data.epoch_batches(1, 1)[0]
    assert data[request(planned, weight=0.0)].loss_weights.tolist() == [0, 0]
    assert data[request(planned, weight=1.5)].loss_weights.tolist() == [1.5, 1.5]


def test_about_half_the_images_are_mirrored_and_a_request_always_gives_the_same(training_set: Load) -> None:
    plain, flipping = training_set(batch_size=1), training_set(batch_size=1, flip_aug=True)
    mirrored = 0
    for epoch in (1, 2, 3, 4):
        for planned in plain.epoch_batches(1, epoch):
            straight, maybe = plain[request(planned)], flipping[request(planned)]
            assert straight.pixels is not None and maybe.pixels is not None
            flipped = torch.equal(maybe.pixels, straight.pixels.flip(-1))
            assert flipped or torch.equal(maybe.pixels, straight.pixels)
            assert torch.equal(maybe.pixels, flipping[request(planned)].pixels)
            mirrored += flipped
    assert 8 < mirrored < 28


def test_random_crops_move_and_stay_inside(training_set: Load) -> None:
    data = training_set(batch_size=1, random_crop=True, enable_bucket=False, resolution=(32, 32))
    item = data.datasets[0].items[1]
    assert (item.size, item.resized, item.bucket) == ((96, 64), (96, 64), (32, 32))
    shown = [data[BatchRequest(0, (1,), (draw,), 1, 0, 1)].pixels for draw in range(5)]
    assert all(pixels is not None and pixels.shape == (1, 3, 32, 32) for pixels in shown)
    assert len({float(pixels.sum()) for pixels in shown if pixels is not None}) == 5


def test_the_left_edge_of_a_mirrored_image_was_its_right_edge(tmp_path: Path, image: Callable[..., Path]) -> None:
    image(tmp_path / "a.png", (64, 35))
    subset = SubsetSettings(tmp_path, class_tokens="x", flip_aug=True)
    sizes = {"enable_bucket": True, "min_bucket_reso": 8, "bucket_reso_steps": 8, "bucket_no_upscale": True}
    data = load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,), **sizes),)))  # type: ignore[arg-type]
    corners = set()
    for draw in range(8):
        batch = data[BatchRequest(0, (0,), (draw,), 1, 0, 1)]
        assert batch.sizes is not None
        corners.add(tuple(batch.sizes.crop_top_left[0].tolist()))
    assert corners == {(0, 2), (0, 3)}  # 64x35 fills 64x32 from 2 to 60.5, mirrored from 3.5


def test_regularisation_images_weigh_what_prior_loss_weight_says(tmp_path: Path, image: Callable[..., Path]) -> None:
    image(tmp_path / "a/1.png", (32, 32))
    image(tmp_path / "b/1.png", (32, 32))
    subsets = (
        SubsetSettings(tmp_path / "a", class_tokens="x", custom_attributes={"diff_output_preservation": True}),
        SubsetSettings(tmp_path / "b", class_tokens="y", is_reg=True),
    )
    settings = DatasetSettings((32, 32), subsets, batch_size=2, network_multiplier=0.5)
    data = load_training_set(DatasetConfig((settings,)), prior_loss_weight=0.25)
    batch = data[BatchRequest(0, (0, 1), (1, 2), 1, 0, 1)]
    assert batch.loss_weights.tolist() == [1, 0.25]
    assert batch.keep_prior == (0,)
    assert batch.network_multipliers is not None and batch.network_multipliers.tolist() == [0.5, 0.5]
    assert (data.num_train_images, data.num_reg_images, data.num_batches) == (1, 1, 1)


def test_buckets_are_logged_and_small_ones_warned_of(training_set: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        training_set(batch_size=4)
    assert "bucket 0: resolution (48, 80), count: 3" in caplog.text
    assert "fewer images than the batch size 4: (48, 80) with 3, (64, 64) with 3, (80, 48) with 3" in caplog.text


def test_an_image_that_breaks_later_is_named(training_set: Load, folder: Path) -> None:
    data = training_set(batch_size=1)
    (folder / "4.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"4\.png cannot be read: not an image"):
        data[BatchRequest(0, (4,), (1,), 1, 0, 1)]


def test_images_too_narrow_for_a_bucket_are_all_named(tmp_path: Path, image: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        image(tmp_path / f"{name}.png", (100, 10))
    settings = DatasetSettings(
        (64, 64), (SubsetSettings(tmp_path, class_tokens="x"),), enable_bucket=True, bucket_no_upscale=True
    )
    with pytest.raises(ValueError, match=r"2 image\(s\) fit no bucket(.|\n)*a\.png(.|\n)*b\.png: .*100x10"):
        load_training_set(DatasetConfig((settings,)))


def test_a_training_set_can_be_sent_to_another_process(training_set: Load) -> None:
    data = training_set()
    planned = data.epoch_batches(1, 1)[0]
    there = pickle.loads(pickle.dumps(data))
    assert torch.equal(there[request(planned)].pixels, data[request(planned)].pixels)
