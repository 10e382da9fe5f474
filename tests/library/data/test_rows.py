"""Masks, second images, colours and crops around faces, as they reach the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.data.caching import cache_latents
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.items import Batch, BatchRequest
from library.data.rows import Row, make_row, masks_of
from library.files.formats import LatentFormat

SD = LatentFormat(channels=4, stride=8, suffix="_sd.npz", reads_stem_files=True)
Load = Callable[..., TrainingSet]


def halves(left: int, right: int, size: tuple[int, int] = (64, 32)) -> Image.Image:
    """A grey image whose left half has one level and whose right half another."""
    image = Image.new("L", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def save_with_alpha(path: Path, left: int, right: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = halves(50, 250)
    Image.merge("RGBA", (grey, grey, grey, halves(left, right))).save(path)


def load(*subsets: SubsetSettings, **settings: Any) -> TrainingSet:
    sizes = {"enable_bucket": True, "min_bucket_reso": 16, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    dataset = DatasetSettings((48, 48), subsets, **(sizes | settings))
    return load_training_set(DatasetConfig((dataset,)))


def levels(data: TrainingSet, *items: int, draw: int = 1) -> Batch:
    """The batch as it is made."""
    return data[BatchRequest(0, items or (0,), (draw,) * max(len(items), 1), 1, 0, 1)]


def batch(data: TrainingSet, *items: int, draw: int = 1) -> Batch:
    """The batch as the training step takes it."""
    return levels(data, *items, draw=draw).to(torch.device("cpu"))


def draw_that_flips(data: TrainingSet, flips: bool) -> int:
    """A number that seeds draws which mirror the first image, or not."""
    for draw in range(50):
        pixels = batch(data, draw=draw).pixels
        assert pixels is not None
        if (pixels[0, 0, 0, 0] > 0) == flips:
            return draw
    raise AssertionError


def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]


def columns(tensor: Tensor | None) -> list[float]:
    """The first row of the first channel of the first image."""
    assert tensor is not None
    return [round(value, 3) for value in tensor[0, 0, 0].tolist()]


def test_the_alpha_channel_is_a_mask_and_images_without_one_count_in_full(tmp_path: Path) -> None:
    save_with_alpha(tmp_path / "a.png", 0, 255)
    halves(50, 250).convert("RGB").save(tmp_path / "b.jpg")
    data = load(SubsetSettings(tmp_path, class_tokens="x", alpha_mask=True))
    found = batch(data, 0, 1)
    assert found.masks is not None and found.masks.shape == (2, 1, 32, 64) and found.masks.dtype == torch.float32
    assert columns(found.masks) == [0.0] * 32 + [1.0] * 32
    assert (found.masks[1] == 1).all()
    assert found.pixels is not None and found.pixels.shape == (2, 3, 32, 64)
    assert batch(load(SubsetSettings(tmp_path, class_tokens="x"))).masks is None


def test_a_mask_is_mirrored_with_its_image(tmp_path: Path) -> None:
    save_with_alpha(tmp_path / "a.png", 51, 255)
    data = load(SubsetSettings(tmp_path, class_tokens="x", alpha_mask=True, flip_aug=True))
    assert columns(batch(data, draw=draw_that_flips(data, False)).masks) == [0.2] * 32 + [1.0] * 32
    assert columns(batch(data, draw=draw_that_flips(data, True)).masks) == [1.0] * 32 + [0.2] * 32


def test_subsets_without_a_mask_count_in_full_beside_others(tmp_path: Path) -> None:
    save_with_alpha(tmp_path / "one/a.png", 0, 0)
    save_with_alpha(tmp_path / "two/a.png", 0, 0)
    one = SubsetSettings(tmp_path / "one", class_tokens="x", alpha_mask=True)
    found = batch(load(one, SubsetSettings(tmp_path / "two", class_tokens="x")), 0, 1)
    assert found.masks is not None
    assert found.masks.mean(dim=(1, 2, 3)).tolist() == [0, 1]


@pytest.mark.parametrize("to_disk", [False, True])
def test_masks_lie_in_the_latent_cache(tmp_path: Path, to_disk: bool) -> None:
    save_with_alpha(tmp_path / "a.png", 51, 255)
    subset = SubsetSettings(tmp_path, class_tokens="x", alpha_mask=True, flip_aug=True)
    live, data = load(subset), load(subset)
    cache_latents(data, encode, SD, vae_id="v", batch_size=1, to_disk=to_disk)
    for flips in (False, True):
        draw = draw_that_flips(live, flips)
        cached = batch(data, draw=draw)
        assert cached.latents is not None and cached.pixels is None
        assert torch.equal(cached.masks, batch(live, draw=draw).masks)  # type: ignore[arg-type]
    if to_disk:
        with np.load(tmp_path / "a_0064x0032_sd.npz") as arrays:
            assert arrays["alpha_mask"].shape == (32, 64) and arrays["alpha_mask"].dtype == np.float32
            assert arrays["alpha_mask"][0, [0, 63]].tolist() == pytest.approx([0.2, 1.0])


def test_a_mask_in_the_cache_that_nobody_asks_for_is_not_applied(tmp_path: Path) -> None:
    save_with_alpha(tmp_path / "a.png", 0, 255)
    masked = load(SubsetSettings(tmp_path, class_tokens="x", alpha_mask=True))
    cache_latents(masked, encode, SD, vae_id="v", batch_size=1, to_disk=True)
    with np.load(tmp_path / "a_0064x0032_sd.npz") as arrays:  # as another program left it
        np.savez(tmp_path / "a_0064x0032_sd.npz", **{n: arrays[n] for n in arrays.files if n != "fingerprint"})
    plain = load(SubsetSettings(tmp_path, class_tokens="x"))
    cache_latents(plain, encode, SD, vae_id="v", batch_size=1, to_disk=True)
    assert batch(plain).latents is not None and batch(plain).masks is None


def test_a_cache_without_a_mask_is_made_anew_when_one_is_asked_for(tmp_path: Path) -> None:
    save_with_alpha(tmp_path / "a.png", 0, 255)
    plain = load(SubsetSettings(tmp_path, class_tokens="x"))
    cache_latents(plain, encode, SD, vae_id="v", batch_size=1, to_disk=True)
    masked = load(SubsetSettings(tmp_path, class_tokens="x", alpha_mask=True))
    cache_latents(masked, encode, SD, vae_id="v", batch_size=1, to_disk=True)
    assert columns(batch(masked).masks) == [0.0] * 32 + [1.0] * 32


def pairs(tmp_path: Path, masked_loss: bool, **changes: Any) -> TrainingSet:
    """One image with a second one whose red channel is 0 on the left and 255 on the right."""
    for name in ("a", "c"):
        (tmp_path / name).mkdir(exist_ok=True)
    halves(50, 250).convert("RGB").save(tmp_path / "a/1.png")
    Image.merge("RGB", (halves(0, 255), halves(9, 9), halves(9, 9))).save(tmp_path / "c/1.png")
    subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "c", **changes)
    return load(subset, masked_loss=masked_loss)


def test_the_red_channel_of_the_second_image_is_the_mask(tmp_path: Path) -> None:
    found = batch(pairs(tmp_path, masked_loss=True))
    assert found.conditioning is None
    assert columns(found.masks) == [0.0] * 32 + [1.0] * 32


def test_a_control_trainer_gets_the_second_image_itself(tmp_path: Path) -> None:
    found = batch(pairs(tmp_path, masked_loss=False))
    assert found.masks is None and found.conditioning is not None and found.conditioning.shape == (1, 3, 32, 64)
    assert columns(found.conditioning) == [-1.0] * 32 + [1.0] * 32
    assert columns(found.conditioning[:, 1:]) == [round(9 / 127.5 - 1, 3)] * 64


@pytest.mark.parametrize("cached", [False, True])
def test_the_second_image_is_mirrored_with_the_first(tmp_path: Path, cached: bool) -> None:
    data = pairs(tmp_path, masked_loss=True, flip_aug=True)
    plain, mirrored = draw_that_flips(data, False), draw_that_flips(data, True)
    if cached:
        cache_latents(data, encode, SD, vae_id="v", batch_size=1, to_disk=False)
    assert columns(batch(data, draw=plain).masks) == [0.0] * 32 + [1.0] * 32
    assert columns(batch(data, draw=mirrored).masks) == [1.0] * 32 + [0.0] * 32


def test_the_second_image_is_cropped_like_the_first(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        Image.fromarray(ramp).save(tmp_path / name / "1.png")
    subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "c")
    found = batch(load(subset, enable_bucket=False))
    assert found.pixels is not None and found.pixels.shape == (1, 3, 48, 48)
    assert torch.equal(found.conditioning, found.pixels)  # type: ignore[arg-type]


def test_a_second_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    data = pairs(tmp_path, masked_loss=True)
    (tmp_path / "c/1.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"c.1\.png cannot be read"):
        batch(data)


def test_colours_change_a_third_of_the_time_and_leave_the_mask_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "a/1.png")
    plain = batch(load(SubsetSettings(tmp_path / "a", class_tokens="x", alpha_mask=True)))
    data = load(SubsetSettings(tmp_path / "a", class_tokens="x", alpha_mask=True, color_aug=True))
    changed = 0
    for draw in range(60):
        found = batch(data, draw=draw)
        assert torch.equal(found.masks, plain.masks)  # type: ignore[arg-type]
        assert torch.equal(found.pixels, batch(data, draw=draw).pixels)  # type: ignore[arg-type]
        changed += not torch.equal(found.pixels, plain.pixels)  # type: ignore[arg-type]
    assert 10 <= changed <= 30


def test_a_crop_stands_around_the_face_that_the_name_tells_of(tmp_path: Path) -> None:
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    image[40:60, 220:240] = 255
    Image.fromarray(image).save(tmp_path / "me_230_50_20_20.png")
    Image.fromarray(image).save(tmp_path / "none.png")
    subset = SubsetSettings(tmp_path, class_tokens="x", face_crop_aug_range=(2.0, 2.0))
    data = load(subset, enable_bucket=False)
    face = batch(data, 0).pixels
    middle = batch(data, 1).pixels
    assert face is not None and middle is not None and face.shape == middle.shape == (1, 3, 48, 48)
    assert face[0, :, 20:28, 20:28].min() > 0.9
    assert middle[0, :, 20:28, 20:28].max() == -1


@pytest.mark.parametrize("masked_loss", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flip_aug": True},
        {"color_aug": True},
        {"random_crop": True},
        {"face_crop_aug_range": (1.0, 2.0)},
        {"alpha_mask": True, "flip_aug": True, "color_aug": True},
    ],
)
def test_every_kind_of_picture_travels_in_eight_bits_and_becomes_the_numbers_of_the_formula(
    tmp_path: Path, change: dict[str, Any], masked_loss: bool
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 80, 90, 4), dtype=np.uint8)
    for folder, content in zip("ac", noise, strict=True):
        (tmp_path / folder).mkdir()
        Image.fromarray(content).save(tmp_path / folder / "me_30_40_20_20.png")
    subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "c", **change)
    data = load(subset, masked_loss=masked_loss)
    item = data.datasets[0].items[0]
    for draw in range(12):
        request = BatchRequest(0, (0,), (draw,), 1, 0, 1)
        row = make_row(item, data.datasets[0], Random(draw), request)
        sent, found = levels(data, draw=draw), batch(data, draw=draw)
        shown = {"pixels": row.picture, "conditioning": row.conditioning}
        for name, picture in shown.items():
            there, here = getattr(sent, name), getattr(found, name)
            assert (picture is None) == (there is None) == (here is None)
            if picture is not None:
                assert there.dtype == torch.uint8 and here.dtype == torch.float32 and here.is_contiguous()
                expected = (torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
                assert torch.equal(here[0], expected)
        assert (found.masks is None) == (row.mask is None) == (not masked_loss and "alpha_mask" not in change)
        if row.mask is not None:
            assert sent.masks.dtype == torch.uint8  # type: ignore[union-attr]
            assert torch.equal(found.masks[0, 0], torch.from_numpy(row.mask.copy()).float() / 255)  # type: ignore[index]


def test_masks_of_eight_bits_beside_cached_ones_in_floats_keep_their_values() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    cached = eight.astype(np.float32) / 255
    rows = [Row("", (), False, mask=mask) for mask in (eight[:, ::-1], cached[:, ::-1], None)]
    masks = masks_of(rows, (6, 4))
    assert masks is not None and masks.shape == (3, 1, 4, 6) and masks.dtype == torch.float32
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0, 0], torch.from_numpy(cached[:, ::-1].copy()))
    assert (masks[2] == 1).all()


@pytest.mark.parametrize("change", [{"color_aug": True}, {"face_crop_aug_range": (1.0, 2.0)}, {"random_crop": True}])
def test_pictures_that_change_cannot_be_cached(tmp_path: Path, change: dict[str, Any]) -> None:
    save_with_alpha(tmp_path / "a.png", 0, 255)
    data = load(SubsetSettings(tmp_path, class_tokens="x", **change))
    with pytest.raises(ValueError, match=f"{next(iter(change))} cannot be used with --cache_latents"):
        cache_latents(data, encode, SD, vae_id="v", batch_size=1, to_disk=False)
