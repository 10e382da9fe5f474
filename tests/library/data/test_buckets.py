"""Bucket arithmetic against recorded tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.buckets import Buckets, centre_crop, crop_condition, rounded_limits

FACTS = json.loads((Path(__file__).resolve().parents[2] / "facts/dataset/bucketing.json").read_text(encoding="utf-8"))
TABLES = FACTS["tables"]


def table_name(table: dict[str, Any]) -> str:
    names = ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    return "-".join(str(table[name]) for name in names)


def buckets_of(table: dict[str, Any]) -> Buckets:
    step = table["bucket_reso_steps"]
    low, high = rounded_limits(table["min_bucket_reso"], table["max_bucket_reso"], step)
    return Buckets(tuple(table["resolution"]), True, low, high, step, table["bucket_no_upscale"])


@pytest.mark.parametrize("table", TABLES, ids=table_name)
def test_every_image_gets_the_recorded_bucket_scale_and_crop(table: dict[str, Any]) -> None:
    buckets = buckets_of(table)
    assert (buckets.low, buckets.high) == (table["min_used"], table["max_used"])
    used = set()
    for size, bucket, *rest in table["images"]:
        if isinstance(bucket, str):  # a bucket with a side of zero
            with pytest.raises(ValueError, match="too narrow"):
                buckets.fit(tuple(size))
            continue
        fit = buckets.fit(tuple(size))
        resized, aspect_error, crop, offset = rest
        assert (fit.bucket, fit.resized) == (tuple(bucket), tuple(resized)), size
        assert fit.aspect_error == pytest.approx(aspect_error, abs=1e-9)
        assert crop_condition(tuple(size), fit.bucket) == pytest.approx(crop, abs=1e-6)
        assert centre_crop(fit.resized, fit.bucket) == tuple(offset)
        used.add(fit.bucket)
    assert used == {tuple(size) for size in table["buckets_in_use_sorted"] if 0 not in size}


@pytest.mark.parametrize("table", [table for table in TABLES if "predefined" in table], ids=table_name)
def test_the_list_of_buckets_is_as_recorded(table: dict[str, Any]) -> None:
    assert buckets_of(table).predefined == [tuple(size) for size in table["predefined"]]


@pytest.mark.parametrize("table", FACTS["bucketing_disabled"], ids=lambda table: str(table["resolution"]))
def test_without_buckets_the_recorded_scale_and_resolution_are_used(table: dict[str, Any]) -> None:
    buckets = Buckets(tuple(table["resolution"]), enabled=False)
    for size, bucket, resized in table["images"]:
        fit = buckets.fit(tuple(size))
        assert (fit.bucket, fit.resized) == (tuple(bucket), tuple(resized)), size


def test_without_buckets_every_image_covers_the_resolution() -> None:
    fit = Buckets((64, 128), enabled=False).fit((100, 100))
    assert (fit.bucket, fit.resized) == ((64, 128), (128, 128))
