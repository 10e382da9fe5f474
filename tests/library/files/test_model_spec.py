from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from library.files.model_spec import build_model_spec, commit_hash, thumbnail_url

FACTS = json.loads((Path(__file__).parents[2] / "facts/metadata/hashes_and_modelspec.json").read_text(encoding="utf-8"))
WHEN = datetime(2024, 5, 6, 7, 8, 9, 123)
SD1 = {"architecture": "stable-diffusion-v1", "implementation": "diffusers", "resolution": "512x512"}

# The two places where the recorded values are known to be wrong: flow models do not predict epsilon, and
# HunyuanImage drops what the user wrote.
MENDED: dict[str, dict[str, str | None]] = {
    "lumina lora": {"modelspec.prediction_type": None},
    "hunyuan image lora": {"modelspec.prediction_type": None, "modelspec.usage_hint": "h"},
}


def options(argv: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for place, word in enumerate(argv):
        if word.startswith("--"):
            follows = argv[place + 1] if place + 1 < len(argv) else "--"
            pairs[word[2:]] = "" if follows.startswith("--") else follows
    return pairs


def expected(row: dict[str, Any]) -> dict[str, str]:
    entries = row["modelspec"] | {
        "modelspec.date": "2024-05-06T07:08:09",
        "modelspec.implementation_version": "sd-scripts/unknown",
    }
    entries |= MENDED.get(row["model"], {})
    return {key: value for key, value in entries.items() if value is not None}


@pytest.mark.parametrize("row", FACTS["modelspec"], ids=lambda row: row["model"])
def test_the_recorded_entries_come_out(row: dict[str, Any]) -> None:
    given, recorded = options(row["argv"]), expected(row)
    resolution = given.get("resolution")
    name, _, adapter = recorded["modelspec.architecture"].partition("/")
    spec = {
        "architecture": name,
        "implementation": recorded["modelspec.implementation"],
        "resolution": recorded["modelspec.resolution"] if resolution is None else "1024x1024",
    }
    if "modelspec.prediction_type" in recorded:
        spec["prediction_type"] = recorded["modelspec.prediction_type"]
    described = {key.removeprefix("metadata_"): value for key, value in given.items() if key.startswith("metadata_")}
    width_height = None if resolution is None else tuple(int(side) for side in resolution.split(","))
    found = build_model_spec(
        spec,
        described,
        title=given["output_name"],
        resolution=width_height,  # type: ignore[arg-type]
        timestep_range=tuple(  # type: ignore[arg-type]
            int(given[name]) if name in given else None for name in ("min_timestep", "max_timestep")
        ),
        clip_skip=int(given["clip_skip"]) if "clip_skip" in given else None,
        time=WHEN,
        adapter=adapter or None,
    )
    assert found == recorded


def test_a_file_without_a_title_or_a_name_is_called_by_its_kind_and_time() -> None:
    found = build_model_spec(SD1, {}, time=WHEN)
    assert found["modelspec.title"] == "LoRA@2024-05-06T07:08:09"
    found = build_model_spec(SD1, {}, time=WHEN, adapter=None)
    assert found["modelspec.title"] == "Checkpoint@2024-05-06T07:08:09"


def test_the_commit_stands_in_the_version() -> None:
    found = build_model_spec(SD1, {}, commit="0123abc")
    assert found["modelspec.implementation_version"] == "sd-scripts/0123abc"


def test_a_picture_becomes_a_data_url(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"\x00\x01")
    assert thumbnail_url(str(picture)) == "data:image/jpeg;base64,AAE="


def test_a_thumbnail_that_is_not_there_is_left_out_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    assert thumbnail_url("nowhere/picture.png") is None
    assert "--metadata_thumbnail nowhere/picture.png cannot be read" in caplog.text


def test_the_commit_is_forty_hex_digits_or_nothing() -> None:
    commit = commit_hash()
    assert commit is None or (len(commit) == 40 and set(commit) <= set("0123456789abcdef"))


def test_git_is_asked_once_and_not_by_the_threads_that_save(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = commit_hash()
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: pytest.fail("a process was started"))
    assert commit_hash() == commit
