"""The tools that fill caches take the recorded flags and all flags of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_families import CACHE_LATENTS, CACHE_TEXT
from library.flags.cache_tools import CacheTool
from library.flags.dataset import CacheFlags, TextCacheFlags
from library.flags.declare import declared_flags, is_switch, takes_many, value_type
from library.flags.objective import NoiseFlags
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FluxModelFlags

TOOLS = {"cache_latents": (CACHE_LATENTS, 160), "cache_text_encoder_outputs": (CACHE_TEXT, 161)}
MORE_CHOICES = {"max_token_length": [75]}


def words(tmp_path: Path, *more: str) -> list[str]:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"")
    return [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={tmp_path}", "--resolution=64", *more]


@pytest.mark.parametrize("name", TOOLS)
def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path, name: str) -> None:
    tool, count = TOOLS[name]
    rows = json.loads((facts / "cli" / f"tools__{name}.json").read_text(encoding="utf-8"))["flags"]
    flags = declared_flags(tool.groups)
    assert len(rows) == count
    for row in rows:
        declared = flags[row["dest"]]
        kind = value_type(declared)
        choices = [c for c in declared.metadata["choices"] or () if c not in MORE_CHOICES.get(row["dest"], ())]
        ours: dict[str, Any] = {
            "kind": "store_true" if is_switch(declared) else "store",
            "type": kind and kind.__name__,
            "nargs": "*" if takes_many(declared) else None,
            "choices": choices or None,
            "default": declared.default,
        }
        recorded = {key: row.get(key) for key in ours}
        if recorded["choices"] and recorded["type"] is None:
            recorded["type"] = "str"
        if row["dest"] == "blocks_to_swap":
            recorded["type"] = "str"  # a number of them, or auto
        assert ours == recorded, row["dest"]


@pytest.mark.parametrize("tool", [CACHE_LATENTS, CACHE_TEXT], ids=["latents", "text"])
def test_what_is_read_is_declared_and_the_flags_of_the_training_are_all_there(tool: CacheTool) -> None:
    flags = declared_flags(tool.groups).keys()
    assert set(tool.read) <= flags
    assert declared_flags(TRAIN_NETWORK).keys() <= flags


def test_caches_on_disk_are_what_the_tools_make(tmp_path: Path) -> None:
    flags = CACHE_LATENTS.settings("test", words(tmp_path))[CacheFlags]
    assert flags.cache_latents and flags.cache_latents_to_disk
    text = CACHE_TEXT.settings("test", words(tmp_path))[TextCacheFlags]
    assert text.cache_text_encoder_outputs and text.cache_text_encoder_outputs_to_disk


def test_a_settings_file_of_the_training_is_taken_and_what_has_no_effect_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'network_module = "networks.lora"\nlearning_rate = 1e-4\nstrict = true\nnoise_offset = 0.1\nflip_aug = true\n'
        'network_weights = "is-not-there.safetensors"\nadaptive_noise_scale = 1.0\n',
        encoding="utf-8",
    )
    settings = CACHE_LATENTS.settings("test", words(tmp_path, f"--config_file={file}"))
    (warning,) = settings.warnings
    assert warning == (
        "--network_weights, --network_module, --learning_rate, --noise_offset, --adaptive_noise_scale, --strict "
        "have no effect: cached latents do not depend on this"
    )
    assert settings[NoiseFlags].noise_offset is None  # and stays at its default


@pytest.mark.parametrize(
    ("words_given", "message"),
    [
        (("--sdxl", "--flux"), "--flux and --sdxl are two families; leave one out"),
        (("--sdxl", "--v2"), "--v2 is for Stable Diffusion 2.x; leave it out for SDXL"),
        (("--ae={model}",), "--ae is for FLUX.1 and Chroma: add --flux"),
        (("--flux", "--ae=x"), "--ae: there is no file or folder x"),
        (("--random_crop",), "--random_crop needs the pixels at every step"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words_given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        given = [word.format(model=tmp_path / "model.safetensors") for word in words_given]
        CACHE_LATENTS.settings("test", words(tmp_path, *given))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_flag_without_effect_is_one_for_text_and_not_for_latents(tmp_path: Path) -> None:
    given = words(tmp_path, "--shuffle_caption", "--text_cache_variants=4", "--cache_dtype=bfloat16")
    assert "--shuffle_caption, --text_cache_variants have no effect" in CACHE_LATENTS.settings("t", given).warnings[0]
    text = CACHE_TEXT.settings("t", given)
    assert text.warnings == () and text[TextCacheFlags].text_cache_variants == 4


@pytest.mark.parametrize("flag", ["skip_existing", "disable_mmap_load_safetensors"])
def test_flags_of_older_versions_say_why_they_do_nothing(tmp_path: Path, flag: str) -> None:
    (warning,) = CACHE_LATENTS.settings("test", words(tmp_path, f"--{flag}")).warnings
    assert warning.startswith(f"--{flag} has no effect: ")


def test_clip_skip_is_named_with_sdxl_and_weighted_captions_are_not(tmp_path: Path) -> None:
    settings = CACHE_TEXT.settings("test", words(tmp_path, "--sdxl", "--clip_skip=2", "--weighted_captions"))
    (warning,) = settings.warnings
    assert warning.startswith("--clip_skip has no effect with --sdxl")


def test_text_of_flux_and_chroma_is_read_as_their_training_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.safetensors"
    given = words(tmp_path, "--flux", f"--t5xxl={model}", f"--clip_l={model}", "--t5xxl_max_token_length=64")
    flags = CACHE_TEXT.settings("test", given)[FluxModelFlags]
    assert (flags.t5xxl_max_token_length, flags.apply_t5_attn_mask) == (64, False)
    chroma = CACHE_TEXT.settings("test", words(tmp_path, "--flux", "--model_type=chroma", f"--t5xxl={model}"))
    assert chroma[FluxModelFlags].apply_t5_attn_mask and "Chroma was made with it" in chroma.warnings[0]
    (warning,) = CACHE_TEXT.settings("test", [*given, "--max_token_length=150"]).warnings
    assert warning.startswith("--max_token_length has no effect with --flux")
    with pytest.raises(SystemExit):
        CACHE_TEXT.settings("test", [*given, "--weighted_captions"])
    assert "T5-XXL has no weights of words" in capsys.readouterr().err
