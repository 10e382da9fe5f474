"""What must hold for every dataset, not only for those that somebody thought of."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.buckets import Buckets, rounded_limits
from library.data.captions import render_caption
from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, put_into_buckets
from library.data.items import BatchRequest, CachedLatents, ImageItem
from library.data.loader import BatchOrder
from library.data.scan import ScannedDataset

SIZES = [(64, 64), (96, 64), (64, 96), (33, 70)]

settings.register_profile("steady", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("steady")

seeds = st.integers(0, 2**31)


@st.composite
def training_sets(draw: st.DrawFn) -> TrainingSet:
    """One to three datasets of images whose latents are cached, so that nothing is read from disk."""
    datasets = []
    for number in range(draw(st.integers(1, 3))):
        captions = CaptionSettings(shuffle_caption=draw(st.booleans()), caption_tag_dropout_rate=0.3)
        subset = SubsetSettings(Path(f"folder{number}"), captions=captions, flip_aug=draw(st.booleans()))
        items = [
            ImageItem(Path(f"folder{number}/{i}.png"), f"tag{i}, a, b, c, d", repeats, draw(st.booleans()), 0, size)
            for i, (repeats, size) in enumerate(
                draw(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(SIZES)), min_size=1, max_size=12))
            )
        ]
        chosen = DatasetSettings(
            (64, 64),
            (subset,),
            batch_size=draw(st.integers(1, 6)),
            enable_bucket=draw(st.booleans()),
            min_bucket_reso=32,
            max_bucket_reso=128,
            bucket_reso_steps=16,
        )
        for i, item in enumerate(items):
            latents = np.full((1, 2, 2), i, np.float32)
            item.latents = CachedLatents(latents, item.size, (0, 0, 64, 64), latents + 100)
        dataset = put_into_buckets(chosen, ScannedDataset(items, [[i.caption for i in items]], 0, 0))
        datasets.append(dataset)
    return TrainingSet(datasets, config=DatasetConfig(tuple(dataset.settings for dataset in datasets)))


@given(training_sets(), seeds, st.integers(1, 9))
def test_every_image_comes_exactly_its_repeats_in_batches_of_one_bucket(
    data: TrainingSet, seed: int, epoch: int
) -> None:
    planned = data.epoch_batches(seed, epoch)
    uses = Counter((batch.dataset, item) for batch in planned for item in batch.items)
    assert uses == {
        (number, index): item.num_repeats
        for number, dataset in enumerate(data.datasets)
        for index, item in enumerate(dataset.items)
    }
    assert len(planned) == data.num_batches
    for batch in planned:
        dataset = data.datasets[batch.dataset]
        assert len({dataset.items[item].bucket for item in batch.items}) == 1
        assert len(batch.items) <= dataset.settings.batch_size
    draws = [draw for batch in planned for draw in batch.draws]
    assert len(set(draws)) == len(draws)


@given(training_sets(), seeds, st.integers(1, 9), st.integers(1, 7))
def test_the_ranks_are_a_partition_with_equal_lengths_and_a_true_mean(
    data: TrainingSet, seed: int, epoch: int, world_size: int
) -> None:
    shares = [BatchOrder(data, seed, rank, world_size).requests(epoch, 0) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    real = Counter((r.dataset, r.items, r.draws) for share in shares for r in share if r.weight > 0)
    assert real == Counter((b.dataset, b.items, b.draws) for b in data.epoch_batches(seed, epoch))
    for requests in zip(*shares, strict=True):
        assert abs(sum(request.weight for request in requests) - world_size) < 1e-9


@given(training_sets(), seeds, st.integers(1, 4), st.integers(1, 4), st.data())
def test_an_epoch_continues_from_any_batch(
    data: TrainingSet, seed: int, world_size: int, accumulation: int, choice: st.DataObject
) -> None:
    rank = choice.draw(st.integers(0, world_size - 1))
    order = BatchOrder(data, seed, rank, world_size, total_steps=100, accumulation=accumulation)
    whole = order.requests(epoch=3, first_step=17)
    start = choice.draw(st.integers(0, len(whole)))
    again = BatchOrder(data, seed, rank, world_size, total_steps=100, accumulation=accumulation)
    assert again.requests(epoch=3, first_step=17, start_batch=start) == whole[start:]


@given(training_sets(), seeds, st.integers(1, 4), seeds)
def test_any_number_of_workers_makes_the_same_batches_in_any_order(
    data: TrainingSet, seed: int, workers: int, shuffle: int
) -> None:
    requests = BatchOrder(data, seed, total_steps=100).requests(2, 5)
    copies = [pickle.loads(pickle.dumps(data)) for _ in range(workers)]
    answers = {}
    for place in Random(shuffle).sample(range(len(requests)), len(requests)):
        answers[place] = copies[place % workers][requests[place]]
    for place, request in enumerate(requests):
        expected, found = data[request], answers[place]
        assert (expected.captions, expected.paths) == (found.captions, found.paths)
        assert expected.latents is not None and found.latents is not None
        assert torch.equal(expected.latents, found.latents)
        assert torch.equal(expected.loss_weights, found.loss_weights)


@given(training_sets(), seeds)
def test_a_use_of_an_image_does_not_depend_on_the_batch_it_is_in(data: TrainingSet, seed: int) -> None:
    for batch in data.epoch_batches(seed, 1):
        whole = data[BatchRequest(batch.dataset, batch.items, batch.draws, 1, 0, 10)]
        for row, (item, draw) in enumerate(zip(batch.items, batch.draws, strict=True)):
            alone = data[BatchRequest(batch.dataset, (item,), (draw,), 1, 0, 10)]
            assert alone.captions == [whole.captions[row]]
            assert alone.latents is not None and whole.latents is not None
            assert torch.equal(alone.latents[0], whole.latents[row])


@settings(max_examples=300)
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(4, 130),
    st.integers(4, 130),
    st.sampled_from([8, 16, 32, 64]),
    st.data(),
)
def test_no_bucket_is_outside_its_limits_or_off_the_grid(
    width: int, height: int, wide: int, high: int, step: int, choice: st.DataObject
) -> None:
    resolution = (wide * 8, high * 8)
    low = choice.draw(st.integers(step, max(min(resolution), step)))
    top = choice.draw(st.integers(max(resolution), 2 * max(resolution)))
    low, top = rounded_limits(low, top, step)
    if low > min(resolution):
        assume(False)  # refused when the settings are read
    buckets = Buckets(resolution, True, low, top, step)
    fit = buckets.fit((width, height))
    for side in (0, 1):
        assert low <= fit.bucket[side] <= top
        assert fit.bucket[side] % step == 0
        assert fit.resized[side] >= fit.bucket[side]
    assert fit.bucket[0] * fit.bucket[1] <= resolution[0] * resolution[1]
    assert any(fit.resized[side] == fit.bucket[side] for side in (0, 1))


@settings(max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(4, 130), st.sampled_from([8, 16, 32, 64]))
def test_without_upscaling_nothing_grows_and_the_grid_holds(width: int, height: int, side: int, step: int) -> None:
    try:
        fit = Buckets((side * 8, side * 8), True, 0, 0, step, no_upscale=True).fit((width, height))
    except ValueError as error:
        assert "too narrow" in str(error)
        return
    for size, resized, bucket in zip((width, height), fit.resized, fit.bucket, strict=True):
        assert 0 < bucket <= resized <= size
        assert bucket % step == 0


tags = st.lists(st.text("abcdefgh 0123", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=12)
changing = st.builds(
    CaptionSettings,
    shuffle_caption=st.booleans(),
    caption_tag_dropout_rate=st.sampled_from([0.0, 0.3, 1.0]),
    token_warmup_step=st.sampled_from([0, 0.5, 50, 500]),
    token_warmup_min=st.integers(0, 3),
    keep_tokens=st.integers(0, 6),
    enable_wildcard=st.booleans(),
)


def shown(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",")] if text else []


@settings(max_examples=200)
@given(tags, changing, seeds, st.integers(0, 100))
def test_kept_tokens_stay_in_front_and_no_tag_is_made_up(
    words: list[str], chosen: CaptionSettings, seed: int, step: int
) -> None:
    words = [word.strip() for word in words]
    found = shown(render_caption(", ".join(words), chosen, Random(seed), epoch=1, step=step, total_steps=100))
    kept = words[: chosen.keep_tokens]
    assert found[: len(kept)] == kept
    assert not Counter(found[len(kept) :]) - Counter(words[len(kept) :])
    if not chosen.caption_tag_dropout_rate and not chosen.token_warmup_step:
        assert Counter(found) == Counter(words)


@settings(max_examples=200)
@given(tags, tags, tags, changing, seeds, st.integers(0, 100), st.booleans())
def test_what_stands_outside_the_marks_stays_where_it_is(
    head: list[str],
    middle: list[str],
    tail: list[str],
    chosen: CaptionSettings,
    seed: int,
    step: int,
    has_tail: bool,
) -> None:
    chosen = CaptionSettings(**{**vars(chosen), "keep_tokens_separator": "|||"})
    parts = [head, middle, tail] if has_tail else [head, middle]
    caption = " ||| ".join(", ".join(part) for part in parts)
    found = shown(render_caption(caption, chosen, Random(seed), epoch=1, step=step, total_steps=100))
    kept, end = [word.strip() for word in head], [word.strip() for word in tail] if has_tail else []
    assert found[: len(kept)] == kept
    assert found[len(found) - len(end) :] == end
    between = found[len(kept) : len(found) - len(end)]
    assert not Counter(between) - Counter(word.strip() for word in middle)
    assert "|" not in "".join(found)
