"""The tool that makes a single file of a folder of diffusers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

import convert_diffusers_to_flux as tool
from library.files.weights import open_weights, save_safetensors
from library.models.flux.checkpoint import load_transformer
from tests.library.models.flux import small
from tests.library.models.flux.test_checkpoint import SMALL


def run(*words: object) -> int:
    return tool.main([str(word) for word in words])


def test_flags_and_defaults_are_the_recorded_ones(facts: Path) -> None:
    recorded = json.loads((facts / "cli/tools__convert_diffusers_to_flux.json").read_text(encoding="utf-8"))["flags"]
    actions = {action.dest: action for action in tool.make_parser()._actions if action.dest != "help"}
    assert sorted(actions) == sorted(row["dest"] for row in recorded)
    for row in recorded:
        action = actions[row["dest"]]
        assert action.option_strings == row["flags"] and action.default == row["default"] and action.help
        assert action.required == row["required"]
        assert isinstance(action, argparse._StoreTrueAction) == (row["kind"] == "store_true")


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_the_single_file_is_the_same_model(tmp_path: Path, family: str) -> None:
    if family == "flux":
        theirs = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16, guidance_embeds=True)
    else:
        theirs = ChromaTransformer2DModel(
            **SMALL, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2
        )
    small.with_random_weights(theirs, 2)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="300KB")
    target = tmp_path / "made" / "model.safetensors"
    assert run("--diffusers_path", tmp_path / "pipeline", "--save_to", target, "--mem_eff_load_save") == 0
    whole = [load_transformer(path, family, torch.float32, "cpu") for path in (tmp_path / "pipeline", target)]
    first, second = (model.state_dict() for model in whole)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with open_weights(target) as file:
        assert "double_blocks.0.img_attn.qkv.weight" in file.keys()
        assert not any(key.startswith("transformer_blocks") for key in file.keys())


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_the_number_format_can_be_chosen(tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    theirs = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16)
    source, target = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_safetensors(theirs.state_dict(), source)
    assert run("--diffusers_path", source, "--save_to", target, "--save_precision", word) == 0
    with open_weights(target) as file:
        assert {file.dtype(key) for key in file.keys()} == {dtype}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: small.write(small.transformer(small.DEV), folder / "model.safetensors"), "nothing to do"),
        (lambda folder: folder / "no_such_folder", "no such file or folder"),
        (lambda folder: folder, "holds no weights"),
        (lambda folder: save_some(folder), "weights are missing"),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make, message: str
) -> None:
    target = tmp_path / "made.safetensors"
    assert run("--diffusers_path", make(tmp_path), "--save_to", target) == 1
    assert message in caplog.text and not target.exists()


def save_some(folder: Path) -> Path:
    weights = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16).state_dict()
    del weights["transformer_blocks.0.attn.to_add_out.weight"]
    save_safetensors(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_target_that_is_no_safetensors_file_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--diffusers_path", tmp_path, "--save_to", tmp_path / "model.ckpt") == 1
    assert "ends in .safetensors" in caplog.text
    assert run("--diffusers_path", tmp_path, "--save_to", tmp_path / "a.safetensors", "--save_precision", "int4") == 1
    assert "--save_precision int4: expected one of" in caplog.text
