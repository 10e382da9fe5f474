"""Each rank's share of an epoch, and equal batches from every kind of worker."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.data.caching import cache_latents
from library.data.dataset import TrainingSet
from library.data.items import Batch
from library.data.loader import BatchOrder, Loader, _Answers, _start_worker, make_loader
from library.files.formats import LatentFormat

Load = Callable[..., TrainingSet]


def loader(data: TrainingSet, workers: int, persistent: bool = False, **changes: int) -> Loader:
    order = BatchOrder(data, seed=3, total_steps=20, **changes)
    return Loader(order, workers, persistent)


def assert_equal(one: Batch, two: Batch) -> None:
    assert (one.captions, one.paths, one.epoch, one.step) == (two.captions, two.paths, two.epoch, two.step)
    assert torch.equal(one.loss_weights, two.loss_weights)
    for name in ("pixels", "latents"):
        here, there = getattr(one, name), getattr(two, name)
        assert (here is None) == (there is None)
        assert here is None or torch.equal(here, there)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ranks_share_an_epoch(training_set: Load, world_size: int) -> None:
    data = training_set(num_repeats=2, batch_size=2)
    planned = data.epoch_batches(3, 5)
    orders = [BatchOrder(data, 3, rank, world_size) for rank in range(world_size)]
    shares = [order.requests(epoch=5, first_step=0) for order in orders]
    assert {len(share) for share in shares} == {len(orders[0])} == {-(-9 // world_size)}
    rounds = list(zip(*shares, strict=True))
    real = [request for requests in rounds for request in requests if request.weight > 0]
    assert [(request.items, request.draws) for request in real] == [(batch.items, batch.draws) for batch in planned]
    for requests in rounds:  # the mean over the ranks is the mean over the real batches
        assert sum(request.weight for request in requests) == pytest.approx(world_size)


def test_fewer_batches_than_ranks_still_give_each_rank_one(training_set: Load) -> None:
    data = training_set(batch_size=9)
    weights = [BatchOrder(data, 3, rank, 8).requests(1, 0)[0].weight for rank in range(8)]
    assert weights == [8 / 3] * 3 + [0.0] * 5


def test_steps_count_on_from_the_first_and_an_epoch_can_be_resumed(training_set: Load) -> None:
    order = BatchOrder(training_set(batch_size=1), 3, total_steps=50, accumulation=2)
    requests = order.requests(epoch=2, first_step=5)
    assert [request.step for request in requests] == [5, 5, 6, 6, 7, 7, 8, 8, 9]
    assert {request.total_steps for request in requests} == {50}
    assert order.requests(epoch=2, first_step=5, start_batch=4) == requests[4:]
    assert order.requests(epoch=2, first_step=5, start_batch=9) == []


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_give_the_batches_of_the_main_process(training_set: Load, persistent: bool) -> None:
    data = training_set(num_repeats=2, flip_aug=True)
    here, there = loader(data, 0), loader(data, 2, persistent)
    for epoch, start in ((1, 0), (2, 3), (3, 0)):
        expected, found = list(here.epoch(epoch, 0, start)), list(there.epoch(epoch, 0, start))
        assert len(expected) == len(here) - start
        for one, two in zip(expected, found, strict=True):
            assert_equal(one, two)


def test_workers_and_page_locked_memory_hold_pictures_in_eight_bits(
    training_set: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = training_set(batch_size=3)
    locked: list[torch.dtype] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor.dtype)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    requests = BatchOrder(data, seed=3, total_steps=20).requests(1, 0)
    for request, sent in zip(requests, loader(data, 1).epoch(1, 0), strict=True):
        assert sent.pixels is not None and sent.pixels.dtype == torch.uint8
        pinned = sent.pin_memory()
        assert locked.count(torch.uint8) == 1 and pinned.pixels is not None and pinned.pixels.dtype == torch.uint8
        locked.clear()
        assert_equal(pinned.to(torch.device("cpu")), data[request].to(torch.device("cpu")))
        assert_equal(pinned.to(torch.device("cpu")).to(torch.device("cpu")), pinned.to(torch.device("cpu")))


def test_an_epoch_that_was_left_early_does_not_disturb_the_next(training_set: Load) -> None:
    data = training_set(batch_size=1)
    there = loader(data, 2, persistent=True)
    assert len(list(itertools.islice(there.epoch(1, 0), 2))) == 2
    for one, two in zip(loader(data, 0).epoch(2, 0), there.epoch(2, 0), strict=True):
        assert_equal(one, two)


def test_cached_latents_come_from_a_thread_equal_to_the_main_process(training_set: Load, tmp_path: Path) -> None:
    def encode(pixels: torch.Tensor, seeds: object) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]

    fmt = LatentFormat(channels=4, stride=8, suffix="_sd.npz")
    in_memory, on_disk = training_set(num_repeats=2, flip_aug=True), training_set(num_repeats=2, flip_aug=True)
    cache_latents(in_memory, encode, fmt, vae_id="v", batch_size=2, to_disk=False)
    cache_latents(on_disk, encode, fmt, vae_id="v", batch_size=2, to_disk=True)
    assert in_memory.latents_cached and on_disk.latents_cached
    one, two = loader(in_memory, 2), loader(on_disk, 2)
    requests = one.order.requests(1, 0)
    for request, here, there in zip(requests, one.epoch(1, 0), two.epoch(1, 0), strict=True):
        assert here.pixels is None and here.latents is not None and here.latents.shape[:2] == (2, 4)
        assert_equal(here, in_memory[request])
        assert_equal(here, there)


def test_a_broken_image_in_a_worker_is_one_line_with_its_name(training_set: Load, folder: Path) -> None:
    data = training_set(batch_size=1)
    (folder / "4.png").write_bytes(b"gone")
    for workers in (0, 2):
        with pytest.raises(ValueError) as caught:
            list(loader(data, workers).epoch(1, 0))
        assert str(caught.value) == f"{folder / '4.png'} cannot be read: not an image; repair or remove it"


def test_no_more_workers_than_other_cores(training_set: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    made = [
        make_loader(
            training_set(),
            seed=1,
            rank=0,
            world_size=1,
            workers=workers,
            persistent=True,
            total_steps=1,
            accumulation=1,
            pin_memory=False,
        )
        for workers in (0, 1, 8)
    ]
    assert [(one.workers, one.persistent) for one in made] == [(0, False), (1, True), (2, True)]


def test_every_caption_draw_is_new_in_each_epoch(training_set: Load) -> None:
    one = loader(training_set(batch_size=1), 0)
    seen = Counter(batch.captions[0] for epoch in range(1, 5) for batch in one.epoch(epoch, 0))
    assert len(seen) > 18  # 36 shuffles of four tags each


def test_workers_start_after_the_threads_of_opencv_have_run(tmp_path: Path, image: Callable[..., Path]) -> None:
    # A forked worker that stops threads which only its parent has waits for ever.
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name, (64, 64))
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, str(Path(__file__).with_name("opencv_then_workers.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n3\n"), done.stderr


@pytest.mark.parametrize("changes", [{}, {"flip_aug": True, "num_repeats": 2}])
def test_what_a_worker_is_given_can_be_sent_to_a_new_process(training_set: Load, changes: dict[str, int]) -> None:
    data = training_set(batch_size=2, **changes)
    request = BatchOrder(data, 3).requests(1, 0)[0]
    sent = pickle.loads(pickle.dumps((_Answers(data), request, _start_worker)))  # as spawn does
    answers, asked, _ = sent
    found = answers[asked]
    assert isinstance(found, Batch)
    assert_equal(found, data[request])
