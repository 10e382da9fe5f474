"""Prompts are cut into the rows that were recorded; tokenizers are found where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from library.models.text import tokens
from library.models.text.tokens import load_tokenizer, tokenize_rows
from tests.library.models.text.toy_tokenizer import ToyTokenizer


def recorded(facts: Path, part: str) -> Any:
    return json.loads((facts / "prompts" / "prompt_chunks.json").read_text(encoding="utf-8"))[part]


def test_training_captions_are_cut_as_recorded(facts: Path) -> None:
    cases = recorded(facts, "training")
    assert len(cases) == 66
    for case in cases:
        tokenizer = ToyTokenizer(pad_token_id=901 if case["pad_equals_eos"] else 0)
        count = (case["max_length"] - 2) // 5
        words = " ".join(f"w{i}" for i in range(1, case["n_words"] + 1))
        plain = tokenize_rows(tokenizer, [words], max_rows=count, min_rows=count)
        assert plain.ids[0].tolist() == case["ids"], case
        weighted = tokenize_rows(tokenizer, [case["weighted_text"]], max_rows=count, min_rows=count, weighted=True)
        assert weighted.ids[0].tolist() == case["weighted_ids"], case
        assert weighted.weights[0].tolist() == case["weights"], case


def test_prompts_of_pictures_get_as_many_rows_as_recorded(facts: Path) -> None:
    checked = 0
    for case in recorded(facts, "gen_img"):
        if "BREAK" in case["text"]:
            continue
        tokenizer = ToyTokenizer(pad_token_id=901 if case["pad_equals_eos"] else 0)
        rows = tokenize_rows(tokenizer, [case["text"]], max_rows=case["max_embeddings_multiples"], weighted=True)
        assert rows.ids.shape == (1, case["chunks"], 7), case
        expected = case["padded_tokens"][1:-1]
        inner = rows.ids[0, :, 1:-1].flatten().tolist()
        # A row without words has an end mark where the padded line has padding.
        assert [a for a, b in zip(inner, expected) if a != b] in ([], [901]), case
        assert rows.weights.flatten().tolist() == pytest.approx(case["padded_weights"]), case
        checked += 1
    assert checked > 30


def test_all_prompts_of_a_call_get_the_same_number_of_rows() -> None:
    tokenizer = ToyTokenizer(pad_token_id=901)
    rows = tokenize_rows(tokenizer, ["w1", "w1 w2 w3 w4 w5 w6 w7"], max_rows=3)
    assert rows.ids.tolist() == [
        [[900, 1, 901, 901, 901, 901, 901], [900, 901, 901, 901, 901, 901, 901]],
        [[900, 1, 2, 3, 4, 5, 901], [900, 6, 7, 901, 901, 901, 901]],
    ]


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def test_a_tokenizer_is_read_from_the_folder_named_after_its_hub_id(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "openai_clip-vit-large-patch14")
    tokenizer = load_tokenizer("openai/clip-vit-large-patch14", "", str(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 3)
    assert tokenizer("aa", add_special_tokens=False, truncation=False, verbose=False).input_ids == [0, 1]


def test_a_diffusers_folder_brings_its_own_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model" / "tokenizer")
    assert load_tokenizer("openai/clip-vit-large-patch14", "", None, tmp_path / "model").eos_token_id == 3


def test_a_tokenizer_from_the_hub_is_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path / "hub" / "tokenizer")
    monkeypatch.setattr(tokens, "download", lambda hub_id, choose, flag: tmp_path / "hub")
    cache = tmp_path / "cache"
    first = load_tokenizer("stabilityai/stable-diffusion-2", "tokenizer", str(cache))
    assert isinstance(first, CLIPTokenizer)
    monkeypatch.setattr(tokens, "download", lambda *_: pytest.fail("fetched twice"))
    again = load_tokenizer("stabilityai/stable-diffusion-2", "tokenizer", str(cache))
    assert again.get_vocab() == first.get_vocab()
    assert (cache / "stabilityai_stable-diffusion-2").is_dir()


def test_a_tokenizer_that_is_nowhere_names_the_folder_and_the_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any) -> Path:
        raise ValueError("no network")

    monkeypatch.setattr(tokens, "download", offline)
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14") as error:
        load_tokenizer("openai/clip-vit-large-patch14", "", str(tmp_path))
    assert str(tmp_path / "openai_clip-vit-large-patch14") in str(error.value)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt"):
        load_tokenizer("openai/clip-vit-large-patch14", "", None, tmp_path)
