"""Latents are made before the training, the metadata file learns the sizes, and the trainer finds both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import prepare_buckets_latents
from demo_folder import DemoFolder
from library.data.config import read_dataset_config
from library.data.dataset import load_training_set
from library.flags.dataset import CaptionFlags, DatasetFlags

ROOT = Path(__file__).resolve().parents[2]
BUCKETS = ["--max_resolution", "128,128", "--min_bucket_reso", "64", "--max_bucket_reso", "256"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three shapes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("square.png", (128, 128)), ("wide.jpg", (300, 100)), ("高い.webp", (100, 250))):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """Two of the images, and one that is not there."""
    path = tmp_path / "meta.json"
    entries = {"square": {"caption": "a square"}, "wide": {"tags": "wide"}, "gone": {"caption": "gone"}}
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def run(folder: Path, metadata: Path, out: Path, model: DemoFolder, *words: str) -> int:
    return prepare_buckets_latents.main([str(folder), str(metadata), str(out), str(model.checkpoint), *BUCKETS, *words])


def test_latents_lie_beside_the_images_and_sizes_in_the_file(
    folder: Path, metadata: Path, tmp_path: Path, small_sd: DemoFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert run(folder, metadata, out, small_sd, "--batch_size", "2", "--flip_aug") == 0
    assert read(out) == {
        "square": {"caption": "a square", "train_resolution": [128, 128]},
        "wide": {"tags": "wide", "train_resolution": [192, 64]},
        "gone": {"caption": "gone"},
        "高い": {"train_resolution": [64, 192]},
    }
    said = capsys.readouterr().err
    assert "1 entries" in said and "such as gone" in said and "such as 高い" in said
    with np.load(folder / "wide_0300x0100_sd.npz") as arrays:
        assert arrays["latents"].shape == (4, 8, 24) and arrays["latents"].dtype == np.float32
        assert arrays["original_size"].tolist() == [300, 100]
        assert not np.array_equal(arrays["latents"], arrays["latents_flipped"])
    assert sorted(path.name for path in folder.glob("*.npz")) == [
        "square_0128x0128_sd.npz",
        "wide_0300x0100_sd.npz",
        "高い_0100x0250_sd.npz",
    ]


@pytest.mark.parametrize("flags", [[], ["--skip_existing"]])
def test_what_is_there_is_not_made_again(
    folder: Path, metadata: Path, tmp_path: Path, small_sd: DemoFolder, flags: list[str]
) -> None:
    assert run(folder, metadata, tmp_path / "out.json", small_sd) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    (folder / "square_0128x0128_sd.npz").unlink()
    assert run(folder, metadata, tmp_path / "out.json", small_sd, *flags) == 0
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["square_0128x0128_sd.npz"]


def test_the_trainer_reads_the_file_and_agrees_about_the_sizes(
    folder: Path, metadata: Path, tmp_path: Path, small_sd: DemoFolder
) -> None:
    out = tmp_path / "out.json"
    entries = {name: {"caption": f"a {name}"} for name in ("square", "wide", "高い")}
    metadata.write_text(json.dumps(entries), encoding="utf-8")
    assert run(folder, metadata, out, small_sd, "--bucket_no_upscale") == 0
    flags = DatasetFlags(
        train_data_dir=str(folder),
        in_json=str(out),
        resolution=(128, 128),
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=256,
        bucket_no_upscale=True,
    )
    training_set = load_training_set(read_dataset_config(flags, CaptionFlags(), bucket_multiple=64))
    items = training_set.datasets[0].items
    assert {item.path.stem: item.caption for item in items} == {
        "square": "a square",
        "wide": "a wide",
        "高い": "a 高い",
    }
    sizes = {key: entry["train_resolution"] for key, entry in read(out).items()}
    assert {item.path.stem: list(item.bucket) for item in items} == sizes


def test_whole_paths_in_folders_and_alpha(folder: Path, tmp_path: Path, small_sd: DemoFolder) -> None:
    (folder / "more").mkdir()
    Image.new("RGBA", (128, 128), (9, 9, 9, 51)).save(folder / "more/clear.png")
    metadata, out = tmp_path / "empty.json", tmp_path / "out.json"
    metadata.write_text("{}", encoding="utf-8")
    assert run(folder, metadata, out, small_sd, "--full_path", "--recursive", "--alpha_mask", "1") == 0
    assert read(out)[str(folder / "more/clear.png")] == {"train_resolution": [128, 128]}
    with np.load(folder / "more/clear_0128x0128_sd.npz") as arrays:
        assert arrays["alpha_mask"].shape == (128, 128) and np.allclose(arrays["alpha_mask"], 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--bucket_reso_steps", "7"], "bucket_reso_steps = 7; expected a multiple of 8"),
        (["--min_bucket_reso", "512"], "min_bucket_reso"),
        (["--recursive"], "--recursive needs --full_path"),
        (["--mixed_precision", "fp16"], "fp16"),
    ],
)
def test_wrong_settings_give_one_error_and_no_file(
    folder: Path,
    metadata: Path,
    tmp_path: Path,
    small_sd: DemoFolder,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    assert run(folder, metadata, tmp_path / "out.json", small_sd, *change) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out.json").exists()


def test_wrong_files_give_one_error_and_no_file(
    folder: Path, metadata: Path, tmp_path: Path, small_sd: DemoFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out.json", str(small_sd.checkpoint)
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    for words, message in (
        ([str(tmp_path / "none"), str(metadata), str(out), model], "there is no such folder"),
        ([str(folder), str(tmp_path / "none.json"), str(out), model], "there is no such file"),
        ([str(folder), str(tmp_path / "broken.json"), str(out), model], "not a valid .json file"),
        ([str(folder), str(metadata), str(out), str(tmp_path / "none.safetensors")], "no such file or folder"),
    ):
        assert prepare_buckets_latents.main([*words, *BUCKETS]) == 1
        assert message in capsys.readouterr().err and not out.exists()
    (folder / "square.png").write_bytes(b"no image")
    assert run(folder, metadata, out, small_sd) == 1
    assert "square.png: not an image" in capsys.readouterr().err and not out.exists()


def test_the_script_runs_and_its_help_is_quick(
    folder: Path, metadata: Path, tmp_path: Path, small_sd: DemoFolder
) -> None:
    script = [sys.executable, str(ROOT / "tools/prepare_buckets_latents.py")]
    words = [str(word) for word in (folder, metadata, tmp_path / "out.json", small_sd.checkpoint)]
    done = subprocess.run([*script, *words, *BUCKETS], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.json")["wide"]["train_resolution"] == [192, 64]
    command = [sys.executable, "-X", "importtime", script[1], "--help"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert shown.returncode == 0 and "--max_resolution" in shown.stdout
    assert not any(line.endswith(" torch") for line in shown.stderr.splitlines())
