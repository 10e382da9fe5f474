"""The flags of sdxl_train_control_net_lllite.py are the recorded ones; what it does not take is named with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.flags.declare import script_flags
from library.flags.lllite import LLLITE_ABSENT, LLLITE_IDLE, TRAIN_LLLITE, LlliteFlags
from library.models.sdxl.flags import SDXL_IDLE
from tests.clients.lllite_training import lllite_settings
from tests.library.flags.recorded import recorded_flags, signature

SCRIPT = "sdxl_train_control_net_lllite"
IDLE = {**SDXL_IDLE, **LLLITE_IDLE}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "data.toml").touch()
    for folder in ("images", "edges"):
        (tmp_path / folder).mkdir()
    return [f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}", f"--output_dir={tmp_path}"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit):
        lllite_settings(*words)
    return [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    flags = script_flags(TRAIN_LLLITE, IDLE, LLLITE_ABSENT, {})
    replaced = {"caption_extention", "use_8bit_adam", "use_lion_optimizer"}
    rows = recorded_flags(facts, SCRIPT)
    assert len(rows) == 171 and replaced <= flags.keys()
    for name, row in rows.items():
        ours = signature(flags[name], flags[name].default)
        assert ours == {key: row.get(key) for key in ours}


def test_recorded_flags_work_but_for_deepspeed_and_those_with_a_reason(facts: Path) -> None:
    flags = script_flags(TRAIN_LLLITE, IDLE, LLLITE_ABSENT, {})
    unavailable = {name for name in recorded_flags(facts, SCRIPT) if flags[name].metadata["unavailable"]}
    distributed = {"deepspeed", "zero_stage", "zero3_init_flag", "zero3_save_16bit_model"}
    distributed |= {"fp16_master_weights_and_gradients"} | {name for name in flags if name.startswith("offload_")}
    assert unavailable <= distributed
    without_effect = {name for name in recorded_flags(facts, SCRIPT) if flags[name].metadata["no_effect"]}
    assert {"alpha_mask", "clip_skip"} <= without_effect
    assert not any(flags[name].metadata["no_effect"] for name in LlliteFlags.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unet_lr=1", "--unet_lr is not a flag of this script: the network is trained with --learning_rate"),
        ("--text_encoder_lr 1", "--text_encoder_lr is not a flag of this script: no text encoder is trained"),
        ("--masked_loss", "--masked_loss is not a flag of this script: the images in conditioning_data_dir are what"),
        ("--reg_data_dir=a", "--reg_data_dir is not a flag of this script: every image of this training has"),
        ("--prior_loss_weight=2", "--prior_loss_weight is not a flag of this script: every image of this training has"),
        ("--no_metadata", "--no_metadata is not a flag of this script: the file holds no description"),
        ("--training_comment=a", "--training_comment is not a flag of this script: the file holds no description"),
        ("--network_module=networks.lora", "--network_module"),
        ("--network_alpha=1", "--network_alpha"),
        ("--v2", "--v2 is for Stable Diffusion 2.x"),
        ("--random_crop", "--random_crop cannot be used with conditioning images"),
        ("--cond_emb_dim=1", "--cond_emb_dim: "),
        ("--network_dim=0", "--network_dim: "),
        ("--network_dropout=2", "--network_dropout: "),
        ("--network_weights=none.safetensors", "--network_weights: "),
        ("--full_bf16", "--full_bf16 needs --mixed_precision=bf16"),
        ("--fused_backward_pass --optimizer_type=AdamW", "--fused_backward_pass"),
        ("--sample_every_n_steps=1", "previews need --sample_prompts"),
    ],
)
def test_what_cannot_be_is_named(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (line,) = refused(capsys, *base, f"--dataset_config={tmp_path / 'data.toml'}", *words.split())
    assert line.startswith(message)


def test_folders_need_the_folder_of_their_conditioning_images(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [f"--train_data_dir={tmp_path / 'images'}", "--resolution=64"]
    (line,) = refused(capsys, *base, *images)
    assert line.startswith("--conditioning_data_dir is missing: the folder with a second image for each")
    (line,) = refused(capsys, *base, *images, f"--in_json={tmp_path / 'data.toml'}")
    assert line.startswith("--in_json is not for image pairs")
    settings = lllite_settings(*base, *images, f"--conditioning_data_dir={tmp_path / 'edges'}")
    assert settings.given("conditioning_data_dir")


def test_what_does_nothing_is_said_once(base: list[str], tmp_path: Path) -> None:
    words = [*base, f"--dataset_config={tmp_path / 'data.toml'}", "--alpha_mask", "--clip_skip=2"]
    said = [line for line in lllite_settings(*words).warnings if "no effect" in line]
    assert sorted(said) == [
        "--alpha_mask has no effect: image pairs are learnt as a whole",
        "--clip_skip has no effect: Stable Diffusion XL reads both of its text encoders before their last layer",
    ]
