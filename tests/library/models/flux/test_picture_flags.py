"""Do the flags of the script that makes pictures have the published names, and are mistakes named?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.flags.declare import declared_flags, is_switch, takes_many, value_type
from library.flags.settings import Settings, read_settings
from library.models.flux.picture_flags import FLUX_PICTURES, PICTURE_RULES, FluxPictureFlags

OURS = {"t5xxl_max_token_length", "controlnet_model_name_or_path", "controlnet_image", "tokenizer_cache_dir"}


def words_in(folder: Path) -> list[str]:
    for name in ("flux", "clip_l", "t5xxl", "ae", "lora"):
        (folder / f"{name}.safetensors").touch()
    parts = [f"--{name}={folder / name}.safetensors" for name in ("clip_l", "t5xxl", "ae")]
    return [f"--ckpt_path={folder / 'flux.safetensors'}", *parts]


def read(*words: str) -> Settings:
    return read_settings(FLUX_PICTURES, "a test", argv=words, rules=PICTURE_RULES)


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    rows = json.loads((facts / "cli" / "flux_minimal_inference.json").read_text(encoding="utf-8"))["flags"]
    flags = declared_flags(FLUX_PICTURES)
    assert len(rows) == 24 and flags.keys() - {row["dest"] for row in rows} == OURS
    for row in rows:
        declared = flags[row["dest"]]
        kind = value_type(declared)
        ours = {
            "flags": [f"--{declared.name}"],
            "kind": "store_true" if is_switch(declared) else "store",
            "type": kind and kind.__name__,
            "nargs": "*" if takes_many(declared) else None,
            "choices": list(declared.metadata["choices"] or ()) or None,
            "default": list(declared.default) if declared.default == () else declared.default,
        }
        assert ours == {key: row.get(key) for key in ours}


@pytest.mark.parametrize(
    ("name", "known_as"),
    [("bf16", "bfloat16"), ("half", "float16"), ("FP32", "float32"), ("bfloat16", "bfloat16")],
)
def test_number_formats_have_several_names(tmp_path: Path, name: str, known_as: str) -> None:
    assert read(*words_in(tmp_path), f"--dtype={name}")[FluxPictureFlags].dtype == known_as


def test_weights_may_be_kept_in_float8(tmp_path: Path) -> None:
    flags = read(*words_in(tmp_path), "--flux_dtype=fp8", "--t5xxl_dtype=fp16")[FluxPictureFlags]
    assert (flags.flux_dtype, flags.t5xxl_dtype) == ("float8_e4m3fn", "float16")


def test_lora_files_have_a_multiplier_or_count_in_full(tmp_path: Path) -> None:
    words = words_in(tmp_path)
    lora = str(tmp_path / "lora.safetensors")
    flags = read(*words, "--lora_weights", f"{lora};0.8", lora, f"{lora};-1")[FluxPictureFlags]
    assert flags.lora_weights == ((lora, 0.8), (lora, 1.0), (lora, -1.0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype=int8"], "--dtype: expected bf16, fp16 or fp32, got 'int8'"),
        (["--lora_weights", "nowhere.safetensors;1"], "--lora_weights: there is no file nowhere.safetensors"),
        (["--lora_weights", "{lora};strong"], "--lora_weights: expected path;multiplier, got"),
        (["--ae_dtype=fp8"], "--ae_dtype: expected bf16, fp16 or fp32, got 'fp8'"),
        (["--flux_dtype=int4"], "--flux_dtype: expected fp8, bf16, fp16 or fp32, got 'int4'"),
        (["--steps=0"], "--steps: must be at least 1, got 0"),
        (["--model_type=sdxl"], "--model_type: invalid choice: 'sdxl'"),
        (["--controlnet_image={lora}"], "--controlnet_image needs --controlnet_model_name_or_path"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        read(*words_in(tmp_path), *(word.format(lora=tmp_path / "lora.safetensors") for word in words))
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert line.strip().startswith(said)


def test_every_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read()
    lines = [line.split()[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert sorted(lines) == ["--ae", "--ckpt_path", "--clip_l", "--t5xxl"]


def test_a_scale_without_a_negative_prompt_is_doubted(tmp_path: Path) -> None:
    words = words_in(tmp_path)
    (warning,) = read(*words, "--cfg_scale=4").warnings
    assert warning == "--cfg_scale=4.0 has no effect without --negative_prompt"
    assert read(*words, "--cfg_scale=4", "--negative_prompt=bad").warnings == ()
    assert read(*words, "--cfg_scale=4", "--interactive").warnings == ()
