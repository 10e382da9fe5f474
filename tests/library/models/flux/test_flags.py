"""Do the flags of FLUX and Chroma have the published names, and do they say what does not go together?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.flags.declare import declared_flags, is_switch, takes_many, value_type
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK, FluxModelFlags, FluxTrainingFlags
from library.models.flux.rules import FLUX_RULES

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The shortest command line of flux_train_network.py without a mistake."""
    for name in ("flux", "clip_l", "t5xxl", "ae"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "images").mkdir()
    return [
        f"--pretrained_model_name_or_path={tmp_path / 'flux.safetensors'}",
        *(f"--{name}={tmp_path / name}.safetensors" for name in ("clip_l", "t5xxl", "ae")),
        f"--train_data_dir={tmp_path / 'images'}",
        "--resolution=512",
        f"--output_dir={tmp_path / 'out'}",
        "--network_module=networks.lora_flux",
    ]


@pytest.fixture
def read(base: list[str]) -> Read:
    return lambda *words, without=(): read_settings(
        FLUX_TRAIN_NETWORK,
        "a test",
        argv=[*(word for word in base if not word.startswith(without)), *words],
        rules=FLUX_RULES,
    )


@pytest.fixture
def refused(read: Read, capsys: pytest.CaptureFixture[str]) -> Refused:
    def mistakes(*words: str, without: Any = ()) -> list[str]:
        with pytest.raises(SystemExit):
            read(*words, without=without)
        return [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]

    return mistakes


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    rows = json.loads((facts / "cli" / "flux_train_network.json").read_text(encoding="utf-8"))["flags"]
    flags = declared_flags(FLUX_TRAIN_NETWORK)
    shared = declared_flags(TRAIN_NETWORK)
    own = [row for row in rows if row["dest"] not in shared]
    assert len(rows) == 215 and len(own) == 22
    assert not {row["dest"] for row in rows} - flags.keys()
    for row in own:
        declared = flags[row["dest"]]
        kind = value_type(declared)
        ours = {
            "flags": [f"--{declared.name}"],
            "kind": "store_true" if is_switch(declared) else "store",
            "nargs": "*" if takes_many(declared) else None,
            "choices": list(declared.metadata["choices"] or ()) or None,
            "default": declared.default,
        }
        assert ours == {key: row.get(key) for key in ours}
        if declared.name != "blocks_to_swap":  # which is a number of them, or auto
            assert row.get("type") in (kind and kind.__name__, None)


def test_scales_win_over_a_plain_cast_and_split_mode_is_18_swapped_blocks(read: Read) -> None:
    settings = read("--fp8_scaled", "--fp8_base", "--split_mode", "--mixed_precision=bf16")
    values = settings.values()
    assert (values["fp8_base"], values["blocks_to_swap"]) == (False, 18)
    assert len(settings.warnings) == 2
    assert read("--split_mode", "--blocks_to_swap=auto").values()["blocks_to_swap"] == "auto"


def test_what_never_had_an_effect_works_here_or_is_named(facts: Path) -> None:
    rows = json.loads((facts / "cli" / "flux_train_network.json").read_text(encoding="utf-8"))["flags"]
    dead = {row["dest"] for row in rows if re.match("no effect|warning|metadata|never read", row.get("effect", ""))}
    work = {"mem_eff_attn", "xformers", "sdpa", "min_timestep", "max_timestep", "controlnet_model_name_or_path"}
    assert dead == FLUX_IDLE.keys() | work


def test_a_gradient_that_has_to_go_through_main_memory_is_named(read: Read) -> None:
    (warning,) = read("--cpu_modulation").warnings
    assert warning.startswith("--cpu_modulation while a text encoder is trained lets the device wait")
    assert not read("--cpu_modulation", "--network_train_unet_only").warnings


def test_a_flag_without_effect_is_named_and_stays_at_its_default(base: list[str]) -> None:
    words = [*base, "--min_snr_gamma=5", "--noise_offset=0.1", "--max_token_length=225"]
    settings = read_settings(FLUX_TRAIN_NETWORK, "a test", argv=words, idle=FLUX_IDLE, rules=FLUX_RULES)
    assert [warning.partition(" ")[0] for warning in settings.warnings] == [
        *("--max_token_length", "--noise_offset", "--min_snr_gamma")
    ]
    assert settings[NoiseFlags].noise_offset is None and settings[LossFlags].min_snr_gamma is None
    with pytest.raises(SystemExit):
        read_settings(FLUX_TRAIN_NETWORK, "a test", argv=[*words, "--strict"], idle=FLUX_IDLE, rules=FLUX_RULES)


@pytest.mark.parametrize("name", ["clip_l", "t5xxl", "ae"])
def test_a_missing_part_is_named(refused: Refused, name: str) -> None:
    (line,) = refused(without=(f"--{name}=",))
    assert line.startswith(f"--{name} is missing")


def test_chroma_needs_no_clip_l_and_says_so_when_it_is_given(read: Read) -> None:
    without = read("--model_type=chroma", "--guidance_scale=0", "--apply_t5_attn_mask", without=("--clip_l=",))
    assert without.warnings == ()
    (warning,) = read("--model_type=chroma", "--guidance_scale=0", "--apply_t5_attn_mask").warnings
    assert warning.startswith("--clip_l has no effect with --model_type=chroma")


def test_a_controlnet_does_not_go_with_chroma(refused: Refused, base: list[str]) -> None:
    file = base[0].partition("=")[2]
    (line,) = refused("--model_type=chroma", f"--controlnet_model_name_or_path={file}", without=("--clip_l=",))
    assert line.startswith("--controlnet_model_name_or_path is for FLUX.1")


def test_what_chroma_needs_is_applied_and_said(read: Read) -> None:
    settings = read("--model_type=chroma", without=("--clip_l=",))
    assert settings[FluxModelFlags].apply_t5_attn_mask
    assert settings[FluxTrainingFlags].guidance_scale == 0.0
    assert settings.warnings == (
        "--model_type=chroma switches --apply_t5_attn_mask on: Chroma was made with it",
        "--guidance_scale=3.5 becomes 0: Chroma is not distilled and knows no guidance",
    )


def test_flux_keeps_its_guidance_and_its_unmasked_text(read: Read) -> None:
    settings = read()
    assert not settings[FluxModelFlags].apply_t5_attn_mask
    assert settings[FluxTrainingFlags].guidance_scale == 3.5
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "--network_args train_t5xxl=True --cache_text_encoder_outputs",
            "--network_args train_t5xxl=True trains T5-XXL, whose answers",
        ),
        ("--weighted_captions", "--weighted_captions: T5-XXL has no weights of words; leave it out"),
        ("--blocks_to_swap=some", "--blocks_to_swap: must be a number of blocks or auto, got 'some'"),
        ("--blocks_to_swap=-1", "--blocks_to_swap: must be at least 0, got -1"),
        ("--activation_memory=much", "--activation_memory: must be a number of gigabytes or auto, got 'much'"),
        ("--activation_memory=-2", "--activation_memory: must be at least 0, got -2"),
        ("--fp8_scaled", "--fp8_scaled is for storing: add --mixed_precision=bf16 (fp16 on older GPUs)"),
        (
            "--fp8_scaled --mixed_precision=bf16 --network_module=lycoris.kohya",
            "--network_module=lycoris.kohya calculates with the weights, not in float8: add bypass_mode=True",
        ),
        (
            "--cpu_modulation --network_module=lycoris.kohya",
            "--network_module=lycoris.kohya calculates with the weights, which --cpu_modulation keeps from the device",
        ),
        ("--fp8_matmul", "--fp8_matmul needs weights in float8: add --fp8_scaled (or --fp8_base)"),
        (
            f"--fp8_scaled --mixed_precision=bf16 --base_weights {__file__}",
            "--base_weights cannot be added to weights in float8: leave --fp8_scaled out, or give a model that they "
            "are merged into already (FLUX.1: networks/flux_merge_lora.py)",
        ),
        ("--discrete_flow_shift=0", "--discrete_flow_shift: must be above 0, got 0.0"),
        ("--timestep_sampling=nextdit_shift", "--timestep_sampling: invalid choice: 'nextdit_shift'"),
        ("--t5xxl_max_token_length=0", "--t5xxl_max_token_length: must be at least 1, got 0"),
        ("--controlnet_model_name_or_path=nowhere", "--controlnet_model_name_or_path: there is no file nowhere"),
    ],
)
def test_what_cannot_be_is_refused(refused: Refused, word: str, said: str) -> None:
    (line,) = refused(*word.split())
    assert line.startswith(said)


def test_parts_of_the_model_may_be_folders(read: Read, refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    assert read(f"--t5xxl={folder}", without=("--t5xxl",))[FluxModelFlags].t5xxl == str(folder)
    assert refused(f"--ae={tmp_path / 'no'}", without=("--ae",)) == [
        f"--ae: there is no file or folder {tmp_path / 'no'}"
    ]
