"""Do the flags of SDXL have the published names, and do they say what does not go together?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from demo_sdxl_folder import SdxlDemo
from library.flags.declare import declared_flags, is_switch, takes_many, value_type
from library.flags.trainers import TRAIN_NETWORK
from library.models.sdxl.flags import SDXL_TRAIN_NETWORK
from tests.clients.sdxl_training import SmallSdxlTrainer, sdxl_settings, sdxl_words

DATASET = """\
[[datasets]]
resolution = 64
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = {steps}
[[datasets.subsets]]
image_dir = "{pictures}"
{more}
"""

CACHED = "--network_train_unet_only --cache_text_encoder_outputs"
CASES = {
    "v2": ("--v2", "refused", "--v2 is for Stable Diffusion 2.x"),
    "clip_skip given": ("--clip_skip=2", "warned", "reads both of its text encoders before their last layer"),
    "cache_text_encoder_outputs_to_disk without cache_text_encoder_outputs": (
        "--network_train_unet_only --cache_text_encoder_outputs_to_disk",
        "warned",
        "switches --cache_text_encoder_outputs on",
    ),
    "cache_text_encoder_outputs with shuffle_caption, caption_dropout_rate > 0, token_warmup_step > 0 or "
    "caption_tag_dropout_rate > 0": (
        f"{CACHED} --dataset_config={{shuffled}}",
        "stops",
        "shuffle_caption.*text_cache_variants",
    ),
    "cache_text_encoder_outputs without network_train_unet_only": (
        "--cache_text_encoder_outputs",
        "refused",
        "--cache_text_encoder_outputs needs --network_train_unet_only",
    ),
    "bucket_reso_steps not a multiple of 32": (
        "--dataset_config={odd_buckets}",
        "stops",
        "bucket_reso_steps = 48; expected a multiple of 32",
    ),
    "full_fp16 without mixed_precision fp16": ("--full_fp16", "refused", "needs --mixed_precision=fp16"),
    "full_bf16 without mixed_precision bf16": ("--full_bf16", "refused", "needs --mixed_precision=bf16"),
    "fp8_base or fp8_base_unet with mixed_precision no": (
        "--fp8_base_unet",
        "refused",
        "--fp8_base and --fp8_base_unet are for storing",
    ),
    "initial start step >= max_train_steps": ("--initial_step=5", "stops", "would begin after step 5"),
    "scale_weight_norms with a network lacking support": (
        "--network_module=tests.clients.plain_network --scale_weight_norms=1",
        "stops",
        "--scale_weight_norms is not supported",
    ),
    "network_module missing": ("", "refused alone", "--network_module is missing"),
    "dim_from_weights without network_weights": ("--dim_from_weights", "refused", "needs --network_weights"),
    "deepspeed": ("--deepspeed", "refused", "--deepspeed needs the package deepspeed"),
    "no images found": ("--dataset_config={empty}", "stops", "no training images were found"),
    "dataset_config plus train_data_dir, reg_data_dir or in_json": (
        "--dataset_config={empty} --train_data_dir=.",
        "warned",
        "--train_data_dir is ignored",
    ),
    "cpu_offload_checkpointing with gradient_checkpointing": (
        "--cpu_offload_checkpointing --gradient_checkpointing --dry_run",
        "said",
        "a step without content",
    ),
}


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    rows = json.loads((facts / "cli" / "sdxl_train_network.json").read_text(encoding="utf-8"))["flags"]
    flags, shared = declared_flags(SDXL_TRAIN_NETWORK), declared_flags(TRAIN_NETWORK)
    own = [row for row in rows if row["dest"] not in shared]
    assert not {row["dest"] for row in rows} - flags.keys() and len(own) == 3
    for row in own:
        declared = flags[row["dest"]]
        kind = value_type(declared)
        ours = {
            "flags": [f"--{declared.name}"],
            "kind": "store_true" if is_switch(declared) else "store",
            "type": kind and kind.__name__,
            "nargs": "*" if takes_many(declared) else None,
            "choices": list(declared.metadata["choices"] or ()) or None,
            "default": declared.default,
        }
        assert ours == {key: row.get(key) for key in ours}


def test_every_recorded_combination_of_this_family_has_a_case(facts: Path) -> None:
    rows = json.loads((facts / "training" / "combinations.json").read_text(encoding="utf-8"))["checks"]
    assert {row["if"] for row in rows if "sdxl" in row["scope"].split()} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_combination_ends_as_it_should(
    name: str, small_sdxl: SdxlDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, end, message = CASES[name]
    (tmp_path / "nothing").mkdir()
    pictures = small_sdxl.pictures.as_posix()
    bodies = {
        "shuffled": DATASET.format(steps=32, pictures=pictures, more="shuffle_caption = true"),
        "odd_buckets": DATASET.format(steps=48, pictures=pictures, more=""),
        "empty": DATASET.format(steps=32, pictures=(tmp_path / "nothing").as_posix(), more=""),
    }
    files = {}
    for file, text in bodies.items():
        (tmp_path / f"{file}.toml").write_text(text, encoding="utf-8")
        files[file] = (tmp_path / f"{file}.toml").as_posix()
    given = [] if end.endswith("alone") else sdxl_words(small_sdxl, tmp_path / "out")
    given += [word.format_map(files) for word in words.split()]
    if end.startswith("refused"):
        with pytest.raises(SystemExit) as stop:
            sdxl_settings(given)
        assert stop.value.code == 2
        told = capsys.readouterr().err
    elif end == "warned":
        told = "\n".join(sdxl_settings(given).warnings)
    elif end == "stops":
        with pytest.raises(ValueError) as error:
            SmallSdxlTrainer(sdxl_settings(given)).dry_run()
        told = str(error.value)
    else:
        assert SmallSdxlTrainer(sdxl_settings(given)).run() == 0
        told = capsys.readouterr().err
    assert re.search(message, told), told
