"""Encoded captions hold what the settings make of each caption, and only what changed is encoded again."""

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

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.items import Batch, BatchRequest
from library.data.text_caching import cache_text
from library.files.formats import TextFormat

Load = Callable[..., TrainingSet]
TWO_ENCODERS = TextFormat("_te_outputs.npz", ("hidden_state1", "hidden_state2", "pool2"), {"max_token_length": 75})
LONG = TextFormat(
    "_flux_te.npz",
    ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask"),
    {"apply_t5_attn_mask": True},
    token_groups=(("t5_out", "txt_ids", "t5_attn_mask"),),
)
PLAIN = CaptionSettings()
SHUFFLED = CaptionSettings(shuffle_caption=True, keep_tokens=1)


def numbers(text: str, count: int) -> Tensor:
    """`count` numbers that only this text has."""
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode()[-7:], "big") + len(text))
    return torch.rand(count, generator=generator) + 0.1


class Encoder:
    """Stands in for text encoders; it remembers what it was asked."""

    def __init__(self, fmt: TextFormat, dtype: torch.dtype = torch.float32) -> None:
        self.fmt, self.dtype = fmt, dtype
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.calls.append(list(captions))
        rows = [self.two_encoders(text) if self.fmt is TWO_ENCODERS else self.long(text) for text in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def two_encoders(self, text: str) -> dict[str, Tensor]:
        shapes = {"hidden_state1": (7, 3), "hidden_state2": (7, 5), "pool2": (5,)}
        return {
            name: numbers(text, int(np.prod(shape))).reshape(shape).to(self.dtype) for name, shape in shapes.items()
        }

    def long(self, text: str) -> dict[str, Tensor]:
        """Twelve tokens at most, one for each word; the rest is masked and zero."""
        used = min(len(text.split()) + 1, 12)
        mask = (torch.arange(12) < used).long()
        return {
            "l_pooled": numbers(text, 4).to(self.dtype),
            "t5_out": (numbers(text, 72).reshape(12, 6) * mask[:, None]).to(self.dtype),
            "txt_ids": torch.zeros(12, 3),
            "t5_attn_mask": mask,
        }

    @property
    def texts(self) -> list[str]:
        return [text for call in self.calls for text in call]


def fill(data: TrainingSet, fmt: TextFormat = TWO_ENCODERS, **changes: object) -> Encoder:
    encoder = Encoder(fmt)
    options = {"encoder_id": "encoder", "batch_size": 2, "to_disk": True, **changes}
    cache_text(data, encoder, fmt, **options)  # type: ignore[arg-type]
    return encoder


def one(data: TrainingSet, index: int = 0, draw: int = 1, epoch: int = 1) -> Batch:
    return data[BatchRequest(0, (index,), (draw,), epoch, 0, 1)]


def write_caption(folder: Path, number: int, text: str) -> None:
    (folder / f"{number}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("fmt", [TWO_ENCODERS, LONG], ids=["two encoders", "long"])
@pytest.mark.parametrize("to_disk", [True, False], ids=["disk", "memory"])
def test_a_batch_holds_what_the_encoder_says_of_its_captions(
    training_set: Load, fmt: TextFormat, to_disk: bool
) -> None:
    data = training_set(PLAIN)
    assert not any(dataset.text_cache for dataset in data.datasets)
    fill(data, fmt, to_disk=to_disk)
    assert all(dataset.text_cache for dataset in data.datasets)
    batch = data[BatchRequest(0, (0, 3, 6), (1, 2, 3), 1, 0, 1)]
    assert batch.captions == [f"subject {number}, red, round, small" for number in (0, 3, 6)]
    expected = Encoder(fmt)(batch.captions)
    assert batch.text.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch.text[name], values) and batch.text[name].dtype == values.dtype, name


def test_without_a_cache_a_batch_has_captions_alone(training_set: Load) -> None:
    assert one(training_set(PLAIN)).text == {}


def test_the_files_have_the_published_names_and_arrays(training_set: Load, folder: Path) -> None:
    fill(training_set(PLAIN))
    with np.load(folder / "4_te_outputs.npz") as arrays:
        shapes = {name: (arrays[name].shape, arrays[name].dtype.name) for name in TWO_ENCODERS.arrays}
        assert shapes == {
            "hidden_state1": ((7, 3), "float32"),
            "hidden_state2": ((7, 5), "float32"),
            "pool2": ((5,), "float32"),
        }
    fill(training_set(PLAIN), LONG)
    with np.load(folder / "4_flux_te.npz") as arrays:
        assert set(arrays.files) == {*LONG.arrays, "apply_t5_attn_mask", "fingerprint"}
        assert arrays["apply_t5_attn_mask"].dtype == np.bool_ and bool(arrays["apply_t5_attn_mask"])
        assert arrays["t5_attn_mask"].dtype == np.int64


def test_rows_of_padding_are_not_written_and_come_back(training_set: Load, folder: Path) -> None:
    write_caption(folder, 0, "x")
    data = training_set(PLAIN)
    fill(data, LONG)
    with np.load(folder / "0_flux_te.npz") as arrays:
        assert (arrays["t5_out"].shape, arrays["txt_ids"].shape) == ((2, 6), (2, 3))
        assert arrays["t5_attn_mask"].tolist() == [1, 1]
    assert one(data).text["t5_out"].shape == (1, 12, 6) and one(data).text["t5_attn_mask"].sum() == 2


def test_the_settings_of_the_caption_apply(training_set: Load) -> None:
    settings = CaptionSettings(caption_prefix="photo of", caption_suffix="at night")
    encoder = fill(training_set(settings))
    assert sorted(encoder.texts) == ["", *(f"photo of subject {n}, red, round, small at night" for n in range(9))]


def test_of_several_lines_the_first_is_encoded(training_set: Load, folder: Path) -> None:
    write_caption(folder, 0, "first\nsecond")
    assert "first" in fill(training_set(PLAIN)).texts


def test_a_second_run_encodes_nothing(training_set: Load) -> None:
    assert len(fill(training_set(PLAIN)).texts) == 10
    data = training_set(PLAIN)
    assert fill(data).texts == [] and all(dataset.text_cache for dataset in data.datasets)


def test_only_the_edited_caption_is_encoded_again(training_set: Load, folder: Path) -> None:
    fill(training_set(PLAIN))
    write_caption(folder, 4, "something else")
    data = training_set(PLAIN)
    assert fill(data).texts == ["something else"]
    expected = Encoder(TWO_ENCODERS)(["something else"])
    assert torch.equal(one(data, 4).text["pool2"], expected["pool2"])


@pytest.mark.parametrize("change", ["encoder", "length", "mask", "prefix"])
def test_another_encoder_or_setting_encodes_everything_again(training_set: Load, change: str) -> None:
    fill(training_set(PLAIN))
    fill(training_set(PLAIN), LONG)
    again = {
        "encoder": lambda: fill(training_set(PLAIN), encoder_id="other"),
        "length": lambda: fill_as(training_set(PLAIN), replace(TWO_ENCODERS, must_match={"max_token_length": 150})),
        "mask": lambda: fill_as(training_set(PLAIN), replace(LONG, must_match={"apply_t5_attn_mask": False})),
        "prefix": lambda: fill(training_set(CaptionSettings(caption_prefix="photo"))),
    }[change]
    assert len(again().texts) == (9 if change == "prefix" else 10)  # the empty caption has no prefix
    assert again().texts == []


def fill_as(data: TrainingSet, fmt: TextFormat) -> Encoder:
    encoder = Encoder(TWO_ENCODERS if fmt.arrays == TWO_ENCODERS.arrays else LONG)
    cache_text(data, encoder, fmt, encoder_id="encoder", batch_size=2, to_disk=True)
    return encoder


def test_a_file_that_does_not_say_what_it_holds_is_made_anew(training_set: Load, folder: Path) -> None:
    arrays = {name: values.numpy() for name, values in Encoder(TWO_ENCODERS).two_encoders("old").items()}
    np.savez(folder / "4_te_outputs.npz", allow_pickle=False, **arrays)
    assert "subject 4, red, round, small" in fill(training_set(PLAIN)).texts


def test_skip_cache_check_trusts_what_is_there(training_set: Load, folder: Path) -> None:
    old = Encoder(TWO_ENCODERS).two_encoders("old")
    np.savez(folder / "4_te_outputs.npz", allow_pickle=False, **{name: values.numpy() for name, values in old.items()})
    data = training_set(PLAIN)
    assert len(fill(data, skip_cache_check=True).texts) == 9
    assert torch.equal(one(data, 4).text["pool2"][0], old["pool2"])


def test_broken_files_are_encoded_again(training_set: Load, folder: Path) -> None:
    fill(training_set(PLAIN))
    path = folder / "4_te_outputs.npz"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "5_te_outputs.npz").write_bytes(b"")
    assert len(fill(training_set(PLAIN)).texts) == 2


def test_a_stopped_run_is_continued(training_set: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Encoder):
        def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(captions)

    monkeypatch.setattr("library.data.text_caching.BATCHES_IN_MEMORY", 1)
    encoder = Stops(TWO_ENCODERS)
    with pytest.raises(KeyboardInterrupt):
        cache_text(training_set(PLAIN), encoder, TWO_ENCODERS, encoder_id="encoder", batch_size=2, to_disk=True)
    assert len(encoder.texts) == 4
    assert len(fill(training_set(PLAIN)).texts) in (6, 8)  # the last chunk may not have reached the disk


def test_ranks_share_the_files_and_read_what_the_others_wrote(training_set: Load) -> None:
    ranks = [training_set(PLAIN) for _ in range(3)]
    encoders = [fill(data, rank=rank, world_size=3) for rank, data in enumerate(ranks)]
    assert sorted(len(encoder.texts) for encoder in encoders) == [3, 3, 4]
    assert sorted(text for encoder in encoders for text in encoder.texts) == sorted(fill_fresh_texts(ranks[0]))
    assert all(torch.equal(one(ranks[0], i).text["pool2"], one(ranks[2], i).text["pool2"]) for i in range(9))
    assert len(fill(training_set(PLAIN), rank=1, world_size=3, to_disk=False).texts) == 10


def fill_fresh_texts(data: TrainingSet) -> list[str]:
    return ["", *(item.caption for item in data.datasets[0].items)]


def test_short_texts_are_encoded_with_short_ones_and_equal_ones_once(training_set: Load, folder: Path) -> None:
    for number in range(9):
        write_caption(folder, number, "same" if number < 4 else "x" * (20 - number))
    encoder = fill(training_set(PLAIN), to_disk=False, batch_size=3)
    assert [[len(text) for text in call] for call in encoder.calls] == [[0, 4, 12], [13, 14, 15], [16]]


def test_a_dropped_caption_gives_the_encoding_of_the_empty_one(training_set: Load) -> None:
    expected = Encoder(TWO_ENCODERS)([""])
    for to_disk in (True, False):
        data = training_set(CaptionSettings(caption_dropout_rate=0.5))
        fill(data, to_disk=to_disk)
        dropped = [one(data, draw=draw) for draw in range(40)]
        assert 10 < sum(batch.captions == [""] for batch in dropped) < 30
        for batch in dropped:
            assert torch.equal(batch.text["pool2"], expected["pool2"]) == (batch.captions == [""])


def test_every_nth_epoch_all_captions_are_empty(training_set: Load) -> None:
    data = training_set(CaptionSettings(caption_dropout_every_n_epochs=2))
    fill(data)
    assert [one(data, epoch=epoch).captions[0] == "" for epoch in (1, 2, 3, 4)] == [False, True, False, True]


def test_variants_of_a_caption_are_chosen_by_the_draw(training_set: Load, folder: Path) -> None:
    data = training_set(SHUFFLED)
    fill(data, variants=4)
    with np.load(folder / "0_te_outputs.npz") as arrays:
        assert {"pool2", "pool2_v1", "pool2_v2", "pool2_v3"} <= set(arrays.files)
    batches = [one(data, draw=draw) for draw in range(40)]
    seen = {batch.captions[0] for batch in batches}
    assert 2 <= len(seen) <= 4 and all(text.startswith("subject 0, ") for text in seen)
    for batch in batches:
        assert torch.equal(batch.text["pool2"], Encoder(TWO_ENCODERS)(batch.captions)["pool2"])
    again = training_set(SHUFFLED)
    assert fill(again, variants=4).texts == []
    assert [one(again, draw=draw).captions for draw in range(40)] == [batch.captions for batch in batches]


def test_more_variants_keep_those_that_are_there(training_set: Load) -> None:
    fill(training_set(SHUFFLED), variants=2)
    before = training_set(SHUFFLED)
    fill(before, variants=4)
    more = fill(training_set(SHUFFLED), variants=6)
    assert more.texts and "" not in more.texts and len(more.texts) <= 18
    assert fill(training_set(SHUFFLED), variants=6).texts == []


def test_captions_that_change_need_several_variants(training_set: Load) -> None:
    for settings, name in (
        (SHUFFLED, "shuffle_caption"),
        (CaptionSettings(caption_tag_dropout_rate=0.1), "caption_tag_dropout_rate"),
    ):
        with pytest.raises(ValueError, match=rf"pictures: {name} .*--text_cache_variants"):
            fill(training_set(settings))
    with pytest.raises(ValueError, match="token_warmup_step"):
        fill(training_set(CaptionSettings(token_warmup_step=10)), variants=4)
    assert len(fill(training_set(CaptionSettings(enable_wildcard=True))).texts) == 10  # no caption has a choice


def test_bf16_takes_half_the_space_and_comes_back_as_it_was(training_set: Load, folder: Path) -> None:
    data = training_set(PLAIN)
    fill(data, dtype=torch.bfloat16)
    with np.load(folder / "0_te_outputs.npz") as arrays:
        assert arrays["pool2"].dtype == np.uint16 and str(arrays["dtype"]) == "bfloat16"
    expected = Encoder(TWO_ENCODERS)(one(data).captions)["pool2"].bfloat16()
    assert torch.equal(one(data).text["pool2"], expected)


@pytest.mark.parametrize(
    ("encoder", "asked", "stored"),
    [
        (torch.bfloat16, None, "float32"),
        (torch.float16, None, "float16"),
        (torch.float32, torch.float16, "float16"),
        (torch.float16, torch.float32, "float32"),
    ],
    ids=str,
)
def test_numbers_are_stored_as_published_programs_read_them(
    training_set: Load, folder: Path, encoder: torch.dtype, asked: torch.dtype | None, stored: str
) -> None:
    answers = Encoder(TWO_ENCODERS, encoder)
    cache_text(training_set(PLAIN), answers, TWO_ENCODERS, encoder_id="e", batch_size=2, to_disk=True, dtype=asked)
    with np.load(folder / "0_te_outputs.npz") as arrays:
        assert arrays["hidden_state1"].dtype.name == stored and "dtype" not in arrays.files


def test_coarser_numbers_than_asked_for_are_encoded_again_and_finer_ones_taken(training_set: Load) -> None:
    fill(training_set(PLAIN), dtype=torch.bfloat16)
    assert fill(training_set(PLAIN)).texts == []
    assert len(fill(training_set(PLAIN), dtype=torch.float32).texts) == 10
    assert fill(training_set(PLAIN), dtype=torch.bfloat16).texts == []


def test_images_of_one_stem_and_two_captions_of_one_image_do_not_share_a_file(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    image(tmp_path / "a.png", (64, 64), 1)
    image(tmp_path / "a.bmp", (64, 64), 2)
    subset = SubsetSettings(tmp_path, class_tokens="x")
    other = replace(subset, captions=CaptionSettings(caption_prefix="photo of"))
    settings = DatasetSettings((64, 64), (subset,))
    config = DatasetConfig((settings, replace(settings, subsets=(other,)), settings))
    data = load_training_set(config)
    assert sorted(fill(data).texts) == ["", "photo of x", "x"]
    assert len(list(tmp_path.glob("a*_te_outputs.npz"))) == 4
    texts = [data[BatchRequest(number, (0,), (1,), 1, 0, 1)].text["pool2"] for number in range(3)]
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])
    assert fill(load_training_set(config)).texts == []


def test_encodings_that_are_not_numbers_name_the_caption(training_set: Load) -> None:
    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        found = Encoder(TWO_ENCODERS)(captions)
        found["pool2"][[text.startswith("subject 4") for text in captions]] = torch.inf
        return found

    with pytest.raises(ValueError, match="not numbers for 'subject 4, red"):
        cache_text(training_set(PLAIN), encode, TWO_ENCODERS, encoder_id="e", batch_size=2, to_disk=True)


def test_a_file_that_vanishes_during_training_is_named(training_set: Load, folder: Path) -> None:
    data = training_set(PLAIN)
    fill(data)
    (folder / "0_te_outputs.npz").unlink()
    with pytest.raises(ValueError, match="0_te_outputs.npz: not a usable cache of text"):
        one(data)


def test_a_few_encodings_wait_for_the_disk(training_set: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.text_caching.BATCHES_IN_MEMORY", 2)
    encoder = fill(training_set(PLAIN), batch_size=1)
    assert [len(call) for call in encoder.calls] == [1] * 10


def test_what_a_killed_run_left_is_removed_after_a_while(training_set: Load, folder: Path) -> None:
    names = [".4_te_outputs.0123456789ab.tmp.npz", ".5_te_outputs.0123456789ab.tmp.npz", ".mine.npz"]
    for name in names:
        (folder / name).write_bytes(b"half")
    for name in (names[0], names[2]):
        os.utime(folder / name, (1, 1))
    fill(training_set(PLAIN))
    assert [(folder / name).exists() for name in names] == [False, True, True]


def test_what_is_done_is_logged(training_set: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fill(training_set(PLAIN))
    assert "text: 0 of 10 captions are on disk" in caplog.text and "text: 10 of 10 captions encoded" in caplog.text
