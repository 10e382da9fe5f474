"""Caches are reused when they fit, and only what changed is encoded again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library.data import cache_files
from library.data.caching import cache_latents
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.items import BatchRequest
from library.files.formats import LatentFormat

Load = Callable[..., TrainingSet]
SD = LatentFormat(channels=4, stride=8, suffix="_sd.npz", reads_stem_files=True)
FLUX = LatentFormat(channels=4, stride=8, suffix="_flux.npz", sizes_in_keys=True)


class Encoder:
    """Stands in for a VAE: shrinks pictures and adds the noise of each seed."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        assert pixels.dtype == torch.float32 and len(seeds) == len(pixels)
        self.shapes.append(tuple(pixels.shape))
        small = torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]
        noise = [torch.randn(row.shape, generator=torch.Generator().manual_seed(s)) for row, s in zip(small, seeds)]
        return small + torch.stack(noise)

    @property
    def count(self) -> int:
        return sum(shape[0] for shape in self.shapes)


def fill(data: TrainingSet, fmt: LatentFormat = SD, vae_id: str = "vae", **changes: object) -> int:
    """Cache on disk; the answer is the number of pictures that went through the encoder."""
    encoder = Encoder()
    options = {"batch_size": 2, "to_disk": True, **changes}
    cache_latents(data, encoder, fmt, vae_id=vae_id, **options)  # type: ignore[arg-type]
    return encoder.count


def latents(data: TrainingSet, index: int = 0, dataset: int = 0) -> Tensor:
    batch = data[BatchRequest(dataset, (index,), (1,), 1, 0, 1)]
    assert batch.latents is not None and batch.pixels is None
    return batch.latents[0]


def test_the_file_has_the_published_name_and_arrays(training_set: Load, folder: Path) -> None:
    assert fill(training_set(flip_aug=True)) == 18
    with np.load(folder / "1_0096x0064_sd.npz") as arrays:
        assert arrays["latents"].shape == (4, 6, 10) and arrays["latents"].dtype == np.float32
        assert arrays["latents_flipped"].shape == (4, 6, 10)
        assert arrays["original_size"].tolist() == [96, 64]
        assert arrays["crop_ltrb"].tolist() == [4, 0, 76, 48]
        assert len(str(arrays["fingerprint"]).split()) == 5


def test_one_file_holds_several_sizes_where_the_format_says_so(training_set: Load, folder: Path) -> None:
    assert fill(training_set(), FLUX) == 9
    assert fill(training_set(resolution=(32, 32), min_bucket_reso=16), FLUX) == 9
    with np.load(folder / "0_0064x0064_flux.npz") as arrays:
        assert arrays["latents_8x8"].shape == (4, 8, 8) and arrays["latents_4x4"].shape == (4, 4, 4)
        assert {"original_size_8x8", "crop_ltrb_8x8", "fingerprint_8x8", "fingerprint_4x4"} <= set(arrays.files)
    assert fill(training_set(), FLUX) == 0


def test_batches_hold_one_bucket_and_are_full_where_they_can(training_set: Load) -> None:
    encoder = Encoder()
    cache_latents(training_set(), encoder, SD, vae_id="vae", batch_size=2, to_disk=False)
    assert sorted(encoder.shapes) == sorted(
        (count, 3, height, width) for width, height in ((64, 64), (80, 48), (48, 80)) for count in (1, 2)
    )


def test_a_second_run_encodes_nothing_and_gives_the_same(training_set: Load) -> None:
    first, second = training_set(), training_set()
    assert (fill(first), fill(second)) == (9, 0)
    assert torch.equal(latents(first), latents(second))


def test_only_the_changed_image_is_encoded_again(training_set: Load, folder: Path, image: Callable[..., Path]) -> None:
    before = training_set()
    fill(before)
    old = latents(before, 4)
    image(folder / "4.png", (96, 64), seed=99)
    after = training_set()
    assert fill(after) == 1
    assert not torch.equal(latents(after, 4), old)
    assert fill(training_set()) == 0


def test_a_newer_time_alone_is_no_change_and_is_remembered(
    training_set: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(training_set())
    os.utime(folder / "4.png", ns=(1, 1))
    assert fill(training_set()) == 0
    monkeypatch.setattr(cache_files, "image_state", lambda path: pytest.fail(f"{path} was read again"))
    assert fill(training_set()) == 0


@pytest.mark.parametrize(
    "change",
    [{"resize_interpolation": "box"}, {"resolution": (48, 48)}, {"flip_aug": True}],
    ids=["interpolation", "resolution", "flip"],
)
def test_other_settings_encode_again(training_set: Load, change: dict[str, object]) -> None:
    fill(training_set())
    assert fill(training_set(**change)) >= 9
    assert fill(training_set(**change)) == 0


def test_another_vae_encodes_again(training_set: Load) -> None:
    fill(training_set())
    assert fill(training_set(), vae_id="other") == 9


def test_a_broken_cache_file_is_encoded_again(training_set: Load, folder: Path) -> None:
    fill(training_set())
    path = folder / "4_0096x0064_sd.npz"
    path.write_bytes(path.read_bytes()[:300])
    (folder / "5_0064x0096_sd.npz").write_bytes(b"")
    assert fill(training_set()) == 2


def test_a_write_that_is_cut_off_leaves_the_old_file(
    training_set: Load, folder: Path, image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(training_set())
    path = folder / "4_0096x0064_sd.npz"
    old = path.read_bytes()
    image(folder / "4.png", (96, 64), seed=99)

    def die(file: Path, **arrays: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", die)
    with pytest.raises(OSError, match="no space left"):
        fill(training_set())
    assert path.read_bytes() == old
    assert not [file for file in folder.iterdir() if ".tmp" in file.name]


@pytest.mark.parametrize("name", ["4_0096x0064_sd.npz", "4.npz"])
def test_a_file_that_does_not_say_its_origin_is_taken_once_with_one_warning(
    training_set: Load, folder: Path, caplog: pytest.LogCaptureFixture, image: Callable[..., Path], name: str
) -> None:
    for number in (1, 4):
        np.savez(folder / name.replace("4", str(number), 1), latents=np.full((4, 6, 10), number, dtype=np.float32))
    data = training_set()
    assert fill(data) == 7
    assert caplog.text.count("2 latent caches do not say") == 1
    assert latents(data, 4).unique().tolist() == [4]
    caplog.clear()
    assert fill(training_set()) == 0 and not caplog.text
    image(folder / "4.png", (96, 64), seed=99)
    assert fill(training_set()) == 1
    assert latents(training_set_with_caches(training_set)).shape == (4, 8, 8)


def training_set_with_caches(training_set: Load) -> TrainingSet:
    data = training_set()
    assert fill(data) == 0
    return data


def test_a_file_of_another_shape_is_not_taken(training_set: Load, folder: Path) -> None:
    np.savez(folder / "4.npz", latents=np.zeros((4, 8, 8), dtype=np.float32))
    data = training_set()
    assert fill(data) == 9
    assert latents(data, 4).shape == (4, 6, 10)
    with np.load(folder / "4.npz") as arrays:
        assert arrays.files == ["latents"]


def test_skip_cache_check_trusts_what_is_there(training_set: Load, folder: Path) -> None:
    fill(training_set())
    (folder / "4_0096x0064_sd.npz").unlink()
    assert fill(training_set(), vae_id="other", skip_cache_check=True) == 1


def test_ranks_share_the_files_and_each_encodes_all_in_memory(training_set: Load) -> None:
    counts = [fill(training_set(), rank=rank, world_size=3) for rank in range(3)]
    assert counts == [3, 3, 3]
    assert fill(training_set(), rank=2, world_size=3, to_disk=False) == 9


def test_a_rank_reads_what_the_others_wrote(training_set: Load) -> None:
    ranks = [training_set(), training_set()]
    for rank, data in enumerate(ranks):
        fill(data, rank=rank, world_size=2)
    assert all(torch.equal(latents(ranks[0], index), latents(ranks[1], index)) for index in range(9))


def test_images_of_one_stem_and_datasets_of_two_resolutions_do_not_share_a_file(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    image(tmp_path / "a.png", (64, 64), 1)
    image(tmp_path / "a.bmp", (64, 64), 2)
    subset = SubsetSettings(tmp_path, class_tokens="x")
    settings = DatasetSettings((64, 64), (subset,))
    config = DatasetConfig((settings, replace(settings, resolution=(32, 32)), settings))

    def load() -> TrainingSet:
        return load_training_set(config)

    data = load()
    assert fill(data) == 4  # the third dataset uses what the first has
    assert (latents(data, 0) - latents(data, 1)).abs().max() > 0.1
    assert latents(data, 0, dataset=1).shape == (4, 4, 4)
    assert torch.equal(latents(data, 1, dataset=2), latents(data, 1))
    assert (tmp_path / "a_0064x0064_sd.npz").exists() and fill(load()) == 0


def test_seeds_come_from_the_image_so_caches_do_not_depend_on_batches(training_set: Load) -> None:
    one, two = training_set(), training_set()
    fill(one, to_disk=False, batch_size=1)
    fill(two, to_disk=False, batch_size=4)
    assert all(torch.allclose(latents(one, index), latents(two, index), atol=1e-6) for index in range(9))


def test_latents_that_are_not_numbers_name_the_image(training_set: Load, folder: Path) -> None:
    def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        found = torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        found[-1, 0, 0, 0] = torch.nan
        return found

    with pytest.raises(ValueError, match=r"not numbers for .*\d\.png; use --no_half_vae"):
        cache_latents(training_set(), encode, SD, vae_id="vae", batch_size=2, to_disk=True)


def test_all_unreadable_images_are_named(training_set: Load, folder: Path) -> None:
    data = training_set()
    for number in (2, 5):
        (folder / f"{number}.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"2 image\(s\) cannot be read(.|\n)*2\.png(.|\n)*5\.png"):
        fill(data, to_disk=False)


def test_random_crops_cannot_be_cached(training_set: Load) -> None:
    with pytest.raises(ValueError, match=r"random_crop cannot be used with --cache_latents"):
        fill(training_set(random_crop=True))


def test_a_cache_that_vanishes_during_training_is_named(training_set: Load, folder: Path) -> None:
    data = training_set()
    fill(data)
    (folder / "0_0064x0064_sd.npz").unlink()
    with pytest.raises(ValueError, match="0_0064x0064_sd.npz: not a usable latent cache"):
        latents(data, 0)


def test_latents_in_memory_keep_their_type_and_are_handed_out_as_those_on_disk(training_set: Load) -> None:
    def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return Encoder()(pixels, seeds).bfloat16()

    memory, disk = training_set(), training_set()
    cache_latents(memory, encode, SD, vae_id="vae", batch_size=2, to_disk=False)
    cache_latents(disk, encode, SD, vae_id="vae", batch_size=2, to_disk=True)
    kept = memory.datasets[0].items[0].latents
    assert kept is not None and kept.latents.dtype == torch.bfloat16
    assert latents(memory).dtype == torch.float32 and torch.equal(latents(memory), latents(disk))
    half = training_set()
    fill(half, to_disk=False, dtype=torch.float16)
    found = half.datasets[0].items[0].latents
    assert found is not None and found.latents.dtype == torch.float16


def test_the_count_of_cached_images_is_logged(training_set: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fill(training_set())
    assert "latents: 0 of 9 are on disk" in caplog.text and "latents: 9 of 9 encoded" in caplog.text


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "float16"), (torch.bfloat16, "uint16")], ids=str)
def test_latents_of_sixteen_bits_take_half_the_space(
    training_set: Load, folder: Path, dtype: torch.dtype, stored: str
) -> None:
    exact = training_set()
    fill(exact)
    size = (folder / "1_0096x0064_sd.npz").stat().st_size
    assert fill(training_set(flip_aug=True), FLUX, dtype=dtype) == 18
    data = training_set()
    for number in range(9):
        next(folder.glob(f"{number}_*_sd.npz")).unlink()
    assert fill(data, dtype=dtype) == 9
    with np.load(folder / "1_0096x0064_sd.npz") as arrays:
        assert arrays["latents"].dtype.name == stored
        assert ("dtype" in arrays.files) == (dtype == torch.bfloat16)
    assert (folder / "1_0096x0064_sd.npz").stat().st_size < size
    assert latents(data, 1).dtype == torch.float32  # what the trainer sees does not depend on the file
    assert torch.equal(latents(data, 1), latents(data, 1).to(dtype).float())
    flipped = training_set(flip_aug=True)
    assert fill(flipped, FLUX, dtype=dtype) == 0
    assert latents(flipped, 1).dtype == torch.float32


def test_coarser_latents_than_asked_for_are_encoded_again_and_finer_ones_taken(training_set: Load) -> None:
    fill(training_set(), dtype=torch.bfloat16)
    assert fill(training_set()) == 0
    assert fill(training_set(), dtype=torch.float16) == 9
    assert fill(training_set(), dtype=torch.float32) == 9
    assert fill(training_set(), dtype=torch.bfloat16) == 0


def test_marks_of_four_words_are_those_of_float32(training_set: Load, folder: Path) -> None:
    fill(training_set())
    path = folder / "1_0096x0064_sd.npz"
    with np.load(path) as arrays:
        old = {name: arrays[name] for name in arrays.files}
    old["fingerprint"] = np.array(str(old["fingerprint"]).removesuffix(" float32"))
    np.savez(path, allow_pickle=False, **old)
    assert fill(training_set(), dtype=torch.float32) == 0


def test_a_coarse_file_without_a_mark_says_so_once_it_is_marked(training_set: Load, folder: Path) -> None:
    np.savez(folder / "4_0096x0064_sd.npz", latents=np.zeros((4, 6, 10), dtype=np.float16))
    assert fill(training_set()) == 8
    assert fill(training_set(), dtype=torch.float32) == 1


def test_latents_too_large_for_float16_name_the_image(training_set: Load) -> None:
    def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return torch.full((len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8), 1e6)

    with pytest.raises(ValueError, match=r"another --cache_dtype than float16"):
        cache_latents(training_set(), encode, SD, vae_id="vae", batch_size=2, to_disk=True, dtype=torch.float16)


def test_what_a_killed_run_left_is_removed_after_a_while(training_set: Load, folder: Path) -> None:
    names = [".4_0096x0064_sd.0123456789ab.tmp.npz", ".5_0064x0096_sd.0123456789ab.tmp.npz"]
    for name in names:
        (folder / name).write_bytes(b"half")
    os.utime(folder / names[0], (1, 1))
    assert fill(training_set()) == 9
    assert [(folder / name).exists() for name in names] == [False, True]
