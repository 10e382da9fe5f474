"""What --debug_dataset says: every batch of an epoch, as the training would see it."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.dataset import TrainingSet
from library.data.items import Batch, ImageItem
from library.data.levels import SHARE
from library.data.loader import BatchOrder


def described_batches(training_set: TrainingSet, *, seed: int, total_steps: int, epoch: int = 1) -> Iterator[str]:
    """A few lines for each batch of `epoch`: its bucket, and each image with its size and caption as rendered.

    Every image is read, so that one which cannot be is named by a ValueError. Nothing is written.
    """
    requests = BatchOrder(training_set, seed, total_steps=total_steps).requests(epoch, first_step=0)
    for number, request in enumerate(requests, 1):
        items = [training_set.datasets[request.dataset].items[index] for index in request.items]
        batch = training_set[request]
        width, height = items[0].bucket
        lines = [f"batch {number} of {len(requests)}: dataset {request.dataset + 1}, {len(items)} x {width}x{height}"]
        for row, item in enumerate(items):
            lines += _described(row, item, batch)
        yield "\n".join(lines)


def _described(row: int, item: ImageItem, batch: Batch) -> list[str]:
    (width, height), (scaled_width, scaled_height) = item.size, item.resized
    assert batch.sizes is not None
    top, left = batch.sizes.crop_top_left[row].tolist()
    lines = [
        f"  {item.path}: {width}x{height} scaled to {scaled_width}x{scaled_height}, crop condition ({top}, {left}), "
        f"weight {batch.loss_weights[row].item():g}{', regularisation' if item.is_reg else ''}",
        f"    {batch.captions[row]!r}",
    ]
    if item.conditioning_path is not None:
        lines.append(f"    with {item.conditioning_path}")
    if batch.masks is not None:
        lines.append(f"    the mask keeps {SHARE.numbers(batch.masks[row]).mean().item():.0%}")
    return lines
