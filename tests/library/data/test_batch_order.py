"""Buckets and batches of an epoch against recorded cases; the order itself is mended."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from library.data.config import DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet
from library.data.image_set import put_into_buckets
from library.data.items import ImageItem
from library.data.scan import ScannedDataset

CASES = json.loads(
    (Path(__file__).resolve().parents[2] / "facts/dataset/batch_order.json").read_text(encoding="utf-8")
)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}")
def test_buckets_and_batches_are_as_recorded_and_every_epoch_shows_each_image_its_repeats(case: dict[str, Any]) -> None:
    # The recorded order came from the state that earlier epochs left behind; ours comes from seed and epoch alone.
    items = [ImageItem(Path(name), "", repeats, False, 0, tuple(size)) for name, size, repeats in case["images"]]
    sizes = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    settings = DatasetSettings((64, 64), (SubsetSettings(Path(".")),), batch_size=case["batch_size"], **sizes)
    dataset = put_into_buckets(settings, ScannedDataset(items, [[]], 0, 0))
    data = TrainingSet([dataset])
    assert [[list(bucket.size), bucket.count] for bucket in dataset.buckets] == case["buckets"]
    assert data.num_batches == case["count"]
    recorded = sorted(len(batch) for batch in case["epoch1"])
    for epoch in (1, 2, 3):
        planned = data.epoch_batches(case["seed"], epoch)
        names = [[str(items[item].path) for item in batch.items] for batch in planned]
        assert sorted(len(batch) for batch in names) == recorded
        assert Counter(name for batch in names for name in batch) == {name: n for name, _, n in case["images"]}
