"""Every kind of mistake in a dataset is found, by name, and nothing is found where all is well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.data.checks import all_findings, estimated_tokens
from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.report import Asked, Finding, Severity, as_table, collect

PLAIN_RUN, PLAIN_CAPTIONS = Asked(), CaptionSettings()
BUCKETS: dict[str, Any] = {
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 16,
    "batch_size": 2,
}


def find(
    folder: Path, asked: Asked = PLAIN_RUN, captions: CaptionSettings = PLAIN_CAPTIONS, **changes: Any
) -> dict[str, Finding]:
    """What is found in one folder of training images."""
    own = {name: changes.pop(name) for name in list(changes) if name in SubsetSettings.__dataclass_fields__}
    subset = SubsetSettings(folder, captions=captions, **own)
    config = DatasetConfig((DatasetSettings((64, 64), (subset,), **(BUCKETS | changes)),))
    return {finding.kind: finding for finding in all_findings(collect(lambda: config, asked))}


def names(finding: Finding) -> list[str]:
    return [Path(remark.name).name for remark in finding.remarks]


@pytest.fixture
def good(tmp_path: Path, image: Callable[..., Path]) -> Path:
    """Four images of two shapes with captions."""
    folder = tmp_path / "good"
    for number in range(4):
        image(folder / f"{number}.png", [(64, 64), (96, 64)][number % 2], number)
        (folder / f"{number}.txt").write_text(f"dog {number}, red", encoding="utf-8")
    return folder


def test_nothing_is_wrong_with_a_good_folder(good: Path) -> None:
    assert find(good) == {}


def test_files_that_cannot_be_read_stop_the_training(good: Path) -> None:
    content = bytearray((good / "0.png").read_bytes())
    content[500:900] = bytes(400)  # only decoding shows it
    (good / "0.png").write_bytes(content)
    (good / "1.png").write_bytes(b"")
    finding = find(good)["corrupt"]
    assert sorted(names(finding)) == ["0.png", "1.png"] and finding.severity is Severity.STOPS
    assert finding.title == "2 images cannot be read" and "--skip_corrupt" in finding.cure
    assert find(good, Asked(skip_corrupt=True))["corrupt"].severity is Severity.HURTS


def test_captions_that_are_missing_empty_blank_or_not_text_are_told_apart(good: Path) -> None:
    (good / "0.txt").unlink()
    (good / "1.txt").write_text("", encoding="utf-8")
    (good / "2.txt").write_text(" \n", encoding="utf-8")
    (good / "3.txt").write_bytes(b"\xff\xfe\x00")
    found = find(good)
    assert names(found["missing_caption"]) == ["0.png"]
    assert {remark.text.partition(" ")[0] for remark in found["bad_caption"].remarks} == {"empty;", "not"}
    assert names(found["blank_caption"]) == ["2.png"]
    severities = [found[kind].severity for kind in ("missing_caption", "bad_caption", "blank_caption")]
    assert severities == [Severity.STOPS, Severity.STOPS, Severity.NOTE]
    assert find(good, Asked(allow_uncaptioned=True))["missing_caption"].severity is Severity.NOTE


def test_small_and_tiny_images_say_how_much_they_grow(good: Path, image: Callable[..., Path]) -> None:
    image(good / "tiny.png", (32, 32))
    image(good / "small.png", (60, 60))
    found = find(good, class_tokens="x")
    assert [remark.text for remark in found["tiny"].remarks] == ["32x32 becomes 2.00 times as large"]
    assert [remark.text for remark in found["small"].remarks] == ["60x60 becomes 1.07 times as large"]
    assert (found["tiny"].severity, found["small"].severity) == (Severity.HURTS, Severity.NOTE)


def test_images_that_lose_a_fifth_are_named_with_their_loss(good: Path) -> None:
    found = find(good, enable_bucket=False)
    assert [remark.text for remark in found["cropped"].remarks] == ["96x64 loses 33% in 64x64"] * 2
    assert "cropped" not in find(good, enable_bucket=False, random_crop=True)


def test_the_same_file_and_the_same_picture_are_found(good: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(good / "x.png")
    picture.save(good / "y.jpg", quality=90)
    (good / "z.png").write_bytes((good / "0.png").read_bytes())
    found = find(good, class_tokens="x")
    assert names(found["duplicate"]) == ["0.png"] and "z.png" in found["duplicate"].remarks[0].text
    assert names(found["similar"]) == ["x.png"] and "y.jpg" in found["similar"].remarks[0].text


def test_a_wrong_ending_is_worth_a_note(good: Path) -> None:
    (good / "0.png").rename(good / "0.jpg")
    finding = find(good)["misnamed"]
    assert [remark.text for remark in finding.remarks] == ["holds PNG"] and finding.severity is Severity.NOTE


def test_captions_are_measured_with_everything_that_is_added_and_nothing_dropped(good: Path) -> None:
    settings = CaptionSettings(caption_prefix="one two", caption_dropout_rate=1.0, token_warmup_step=100)
    (good / "1.txt").write_text(", ".join(["word"] * 5), encoding="utf-8")
    asked = Asked(max_tokens=6, count_tokens=lambda text: len(text.replace(",", " ").split()))
    finding = find(good, asked, settings)["long_caption"]
    assert [(Path(r.name).name, r.text) for r in finding.remarks] == [("1.png", "7 tokens")]
    assert finding.title == "1 caption longer than 6 tokens; the rest is cut off"


def test_without_a_tokenizer_the_length_is_an_estimate_and_says_so(good: Path) -> None:
    (good / "1.txt").write_text(", ".join(["word"] * 60), encoding="utf-8")
    finding = find(good)["long_caption"]
    assert finding.remarks[0].text == "about 119 tokens" and "(estimated)" in finding.title
    assert "--tokenizer_cache_dir" in finding.cure
    assert estimated_tokens("a photo of 2 dogs, (masterpiece:1.2)") == 14
    assert estimated_tokens("犬の写真") == 6


def test_a_bucket_with_one_image_and_batches_that_are_not_full(good: Path, image: Callable[..., Path]) -> None:
    image(good / "wide.png", (128, 32), 9)
    found = find(good, class_tokens="x")
    assert [(r.name, Path(r.text).name) for r in found["lonely_bucket"].remarks] == [("128x32", "wide.png")]
    assert found["lonely_bucket"].severity is Severity.HURTS
    assert found["short_batch"].remarks[0].text == "1.67 images in a batch of 2 on average (128x32: 1)"
    assert "lonely_bucket" not in find(good, class_tokens="x", num_repeats=2)


def test_an_image_that_fits_no_bucket_does_not_hide_the_others(good: Path, image: Callable[..., Path]) -> None:
    image(good / "thread.png", (200, 10))
    found = find(good, class_tokens="x", bucket_no_upscale=True)
    assert names(found["no_bucket"]) == ["thread.png"] and found["no_bucket"].severity is Severity.STOPS


def test_folders_without_images_and_no_images_at_all(tmp_path: Path, good: Path) -> None:
    found = find(tmp_path / "nowhere")
    assert found["no_images"].severity is Severity.STOPS
    assert found["empty_folder"].remarks[0].text == "there is no such folder"
    (tmp_path / "empty").mkdir()
    subsets = (SubsetSettings(good), SubsetSettings(tmp_path / "empty"))
    config = DatasetConfig((DatasetSettings((64, 64), subsets, **BUCKETS),))
    kinds = [finding.kind for finding in all_findings(collect(lambda: config, Asked()))]
    assert kinds == ["empty_folder"]


def test_caches_that_hold_no_numbers_or_are_torn_are_found(good: Path) -> None:
    np.savez(good / "0_0064x0064_sd.npz", latents=np.full((4, 8, 8), np.nan, np.float32))
    np.savez(good / "1_0096x0064_sd.npz", latents=np.zeros((4, 8, 12), np.float32))
    (good / "2.npz").write_bytes(b"PK\x03\x04 torn")
    (good / "unrelated.npz").write_bytes(b"torn")
    finding = find(good)["broken_cache"]
    assert names(finding) == ["0_0064x0064_sd.npz", "2.npz"]
    assert finding.remarks[0].text == "latents holds values that are not numbers"


def test_what_the_trainer_would_warn_of_is_passed_on_and_not_logged(
    good: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (good / "a.gif").write_bytes(b"GIF89a")
    finding = find(good)["unused"]
    assert "1 files are not used, such as a.gif" in finding.remarks[0].name
    assert not caplog.text


def test_the_worst_comes_first_and_the_table_is_json(good: Path) -> None:
    (good / "0.png").write_bytes(b"")
    (good / "1.txt").write_text(" \n", encoding="utf-8")
    config = DatasetConfig((DatasetSettings((64, 64), (SubsetSettings(good, num_repeats=3),), **BUCKETS),))
    seen = collect(lambda: config, Asked(accumulation=2, epochs=10))
    findings = all_findings(seen)
    assert [finding.severity for finding in findings] == sorted(
        (finding.severity for finding in findings), key=list(Severity).index
    )
    table = json.loads(json.dumps(as_table(seen, findings)))
    assert table["hurts"] is True and table["findings"][0]["kind"] == "corrupt"
    (dataset,) = table["datasets"]
    assert (dataset["images"], dataset["images_with_repeats"], dataset["batches"]) == (3, 9, 5)
    assert dataset["effective_batch_size"] == 9 / 5
    assert dataset["subsets"][0]["num_repeats"] == 3
    assert dataset["tags"] == {"good": {"dog 2": 1, "dog 3": 1, "red": 2}}
    assert (table["batches_per_epoch"], table["steps_per_epoch"], table["total_steps"]) == (5, 3, 30)


def test_images_without_their_mask_are_named(good: Path, tmp_path: Path, image: Callable[..., Path]) -> None:
    for number in (0, 1, 2, 7):
        image(tmp_path / "masks" / f"{number}.png", [(64, 64), (96, 64)][number % 2])
    subset = SubsetSettings(good, conditioning_data_dir=tmp_path / "masks")
    config = DatasetConfig((DatasetSettings((64, 64), (subset,), masked_loss=True, **BUCKETS),))
    (finding,) = (f for f in all_findings(collect(lambda: config, Asked())) if f.kind == "unpaired")
    assert finding.severity is Severity.STOPS and sorted(names(finding)) == ["3.png", "7.png"]


def test_entries_of_metadata_files_that_lead_nowhere_are_named(good: Path, tmp_path: Path) -> None:
    entries = {str(good / "0.png"): {"caption": "dog"}, str(good / "lost.png"): {"caption": "cat"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    subset = SubsetSettings(None, metadata_file=tmp_path / "meta.json")
    config = DatasetConfig((DatasetSettings((64, 64), (subset,), **BUCKETS),))
    found = {finding.kind: finding for finding in all_findings(collect(lambda: config, Asked()))}
    assert "lost.png" in found["bad_metadata"].remarks[0].name
    assert found["bad_metadata"].severity is Severity.STOPS


def test_held_out_images_are_looked_at_and_not_counted_in_the_epoch(good: Path) -> None:
    (good / "3.txt").write_text("word " * 100, encoding="utf-8")
    subset = SubsetSettings(good)
    config = DatasetConfig((DatasetSettings((64, 64), (subset,), validation_split=0.5, **BUCKETS),))
    seen = collect(lambda: config, Asked())
    table = as_table(seen, all_findings(seen))
    assert (table["validation_images"], table["datasets"][0]["images"]) == (2, 2)
    assert "long_caption" in {finding["kind"] for finding in table["findings"]}
