from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from library.flags.dataset import CacheFlags, CaptionFlags, DatasetFlags
from library.flags.declare import declared_flags, flag
from library.flags.model import ModelFlags
from library.flags.network import NetworkFlags
from library.flags.objective import NoiseFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.run import StepFlags
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]


def test_groups_hold_what_the_command_line_says(read: Read) -> None:
    settings = read(
        "--seed=7", "--network_args", "conv_dim=4", "conv_alpha=1", "--text_encoder_lr", "1e-5", "--flip_aug"
    )
    assert settings[StepFlags].seed == 7
    assert settings[NetworkFlags].network_args == ("conv_dim=4", "conv_alpha=1")
    assert settings[OptimizerFlags].text_encoder_lr == (1e-5,)
    assert settings[DatasetFlags].flip_aug
    assert settings[CaptionFlags] == CaptionFlags()
    assert settings.warnings == ()


def test_given_tells_what_the_user_set_even_to_the_default(read: Read) -> None:
    settings = read("--train_batch_size=1")
    assert settings.given("train_batch_size")
    assert not settings.given("seed")


def test_values_holds_every_flag_once(read: Read) -> None:
    values = read().values()
    assert values.keys() == declared_flags(TRAIN_NETWORK).keys()
    assert values["resolution"] == (512, 512)


def test_settings_cannot_be_written_to(read: Read) -> None:
    settings = read()
    with pytest.raises(FrozenInstanceError):
        settings.warnings = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.groups[ModelFlags] = ModelFlags()  # type: ignore[index]


def test_settings_of_groups_leave_the_others_at_their_defaults() -> None:
    settings = Settings.of(NoiseFlags(noise_offset=0.05))
    assert settings[NoiseFlags].noise_offset == 0.05
    assert settings[StepFlags] == StepFlags()
    assert settings.given("noise_offset") and not settings.given("min_timestep")


@pytest.mark.parametrize(("words", "size"), [("512", (512, 512)), ("512,768", (512, 768)), ("512, 768", (512, 768))])
def test_a_resolution_is_one_size_or_width_and_height(read: Read, words: str, size: tuple[int, int]) -> None:
    assert read(f"--resolution={words}")[DatasetFlags].resolution == size


@pytest.mark.parametrize(
    ("text", "steps"), [("100", 100), ("1", 1), ("0", 0), ("0.1", 0.1), ("10%", 0.1), ("1.0", 1.0), ("100%", 1.0)]
)
def test_warm_up_is_steps_or_a_part_of_the_run(read: Read, text: str, steps: float) -> None:
    value = read(f"--lr_warmup_steps={text}", "--lr_scheduler=cosine")[SchedulerFlags].lr_warmup_steps
    assert value == steps
    assert isinstance(value, int) == (text in ("100", "1"))


@pytest.mark.parametrize("text", ["1.5", "1e3", "150%", "-1", "much"])
def test_other_warm_ups_are_refused(refused: Refused, base: list[str], text: str) -> None:
    (mistake,) = refused(*base, f"--lr_warmup_steps={text}", "--lr_scheduler=cosine")
    assert mistake.startswith("--lr_warmup_steps: expected")


def test_75_tokens_are_the_default_length(read: Read) -> None:
    assert read("--max_token_length=75")[ModelFlags].max_token_length is None
    assert read("--max_token_length=225")[ModelFlags].max_token_length == 225


@pytest.mark.parametrize("name", ["min_snr_gamma", "scale_weight_norms", "noise_offset", "v_pred_like_loss"])
def test_a_strength_of_0_is_off(read: Read, name: str) -> None:
    assert read(f"--{name}=0").values()[name] is None
    assert read(f"--{name}=0.5").values()[name] == 0.5


def test_an_empty_command_line_is_told_all_that_is_missing(refused: Refused) -> None:
    mistakes = refused()
    assert [mistake.split()[0] for mistake in mistakes] == [
        "--pretrained_model_name_or_path",
        "--network_module",
        "--output_dir",
        "no",
    ]
    assert "--network_module=networks.lora" in mistakes[1]
    assert "--dataset_config" in mistakes[3] and "--train_data_dir" in mistakes[3]


def test_mistakes_of_every_kind_come_in_one_message(refused: Refused, base: list[str]) -> None:
    mistakes = refused(
        *base,
        "--seed=x",
        "--sed=1",
        "--save_last_n_epochs=0",
        "--network_args",
        "conv_dim",
        "--ddp_timeout=0",
        "--full_fp16",
    )
    assert len(mistakes) == 6
    assert any(mistake == "--save_last_n_epochs: must be at least 1, got 0" for mistake in mistakes)
    assert any("expected key=value, got 'conv_dim'" in mistake for mistake in mistakes)


def test_a_value_that_cannot_be_read_breaks_no_other_rule(refused: Refused, base: list[str]) -> None:
    assert len(refused(*base, "--full_fp16", "--mixed_precision=fp17")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rate=nan", "--learning_rate: must be at least 0, got nan"),
        ("--learning_rate=1e400", "--learning_rate: must be a number, got inf"),
        ("--noise_offset=nan", "--noise_offset: must be a number, got nan"),
        ("--caption_dropout_rate=1.5", "--caption_dropout_rate: must be at most 1, got 1.5"),
        ("--text_encoder_lr=-1", "--text_encoder_lr: must be at least 0, got -1.0"),
        ("--save_every_n_steps=0", "--save_every_n_steps: must be at least 1, got 0"),
        ("--save_last_n_steps=0", "--save_last_n_steps: must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(refused: Refused, base: list[str], words: str, message: str) -> None:
    assert refused(*base, words) == [message]


@pytest.mark.parametrize(
    "name", ["dataset_config", "train_data_dir", "reg_data_dir", "sample_prompts", "network_weights"]
)
def test_a_path_that_leads_nowhere_is_named(refused: Refused, base: list[str], name: str) -> None:
    mistakes = refused(*base, f"--{name}=nowhere.toml")
    assert f"--{name}: there is no {'folder' if name.endswith('_dir') else 'file'} nowhere.toml" in mistakes


def test_each_of_several_files_must_be_there(refused: Refused, base: list[str], tmp_path: Path) -> None:
    there = tmp_path / "model.safetensors"
    assert refused(*base, "--base_weights", str(there), "gone.safetensors") == [
        "--base_weights: there is no file gone.safetensors"
    ]


def test_a_file_is_no_folder_and_a_folder_no_file(refused: Refused, base: list[str], tmp_path: Path) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "images"
    assert "is a folder, but a file is expected" in refused(*base, f"--network_weights={folder}")[0]
    assert "is a file, but a folder is expected" in refused(*base, f"--reg_data_dir={file}")[0]


def test_a_model_may_be_a_hub_id_but_not_a_missing_file(read: Read, refused: Refused, base: list[str]) -> None:
    assert read("--vae=stabilityai/sd-vae-ft-mse")[ModelFlags].vae == "stabilityai/sd-vae-ft-mse"
    for wrong in ("models/vae.safetensors", "./vae", "vae", "/a/b/c"):
        assert "neither a file, nor a folder, nor a hub id" in refused(*base, f"--vae={wrong}")[0]


def test_a_thumbnail_is_a_file_or_a_data_url(read: Read, refused: Refused, base: list[str]) -> None:
    read("--metadata_thumbnail=data:image/png;base64,AAAA")
    assert refused(*base, "--metadata_thumbnail=a.png") == ["--metadata_thumbnail: there is no file a.png"]


def test_every_flag_is_available() -> None:
    assert not any(declared.metadata["unavailable"] for declared in declared_flags(TRAIN_NETWORK).values())


@dataclass(frozen=True)
class Later:
    """Later"""

    stage: int = flag(2, "stage", type=int, unavailable="what comes later")


def test_a_flag_that_is_not_available_is_refused(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings((*TRAIN_NETWORK, Later), "test", argv=[*base, "--stage=3"])
    assert "--stage is not available yet: what comes later" in capsys.readouterr().err


def test_a_flag_that_is_not_available_may_be_given_its_default(base: list[str]) -> None:
    assert read_settings((*TRAIN_NETWORK, Later), "test", argv=[*base, "--stage=2"])[Later].stage == 2


@pytest.mark.parametrize("name", ["lowram", "highvram", "ddp_static_graph", "ddp_gradient_as_bucket_view"])
def test_a_flag_without_effect_warns_and_is_an_error_when_strict(
    read: Read, refused: Refused, base: list[str], name: str
) -> None:
    (warning,) = read(f"--{name}").warnings
    assert warning.startswith(f"--{name} has no effect: ")
    assert refused(*base, f"--{name}", "--strict") == [warning]


def test_latents_on_disk_switch_caching_on(read: Read) -> None:
    settings = read("--cache_latents_to_disk")
    assert settings[CacheFlags].cache_latents
    assert settings.warnings == ("--cache_latents_to_disk switches --cache_latents on",)


def test_what_follows_from_a_setting_is_checked_too(refused: Refused, base: list[str]) -> None:
    assert len(refused(*base, "--cache_latents_to_disk", "--random_crop")) == 1


def test_a_dataset_file_wins_over_folders_and_says_so(read: Read, tmp_path: Path) -> None:
    (tmp_path / "data.toml").touch()
    settings = read(f"--dataset_config={tmp_path / 'data.toml'}", f"--reg_data_dir={tmp_path}")
    assert settings[DatasetFlags].train_data_dir is None and settings[DatasetFlags].reg_data_dir is None
    assert settings[DatasetFlags].dataset_config == tmp_path / "data.toml"
    assert [warning.split()[0] for warning in settings.warnings] == ["--train_data_dir", "--reg_data_dir"]


def test_previews_every_0_steps_are_none(read: Read) -> None:
    settings = read("--sample_every_n_steps=0")
    assert settings.values()["sample_every_n_steps"] is None
    assert len(settings.warnings) == 1


def test_a_script_may_have_defaults_of_its_own(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    own = {"loss_type": "huber", "max_token_length": 150}
    settings = read_settings(TRAIN_NETWORK, "a test", own, argv=base)
    assert settings.values()["loss_type"] == "huber" and not settings.given("loss_type")
    with pytest.raises(SystemExit) as end:
        read_settings(TRAIN_NETWORK, "a test", own, argv=["--help"])
    assert end.value.code == 0
    assert "(default: huber)" in capsys.readouterr().out


def test_flags_that_a_script_does_not_have_break_no_rule() -> None:
    settings = read_settings([StepFlags, NoiseFlags], "a test", argv=["--seed=1"])
    assert settings[StepFlags].seed == 1
    with pytest.raises(KeyError):
        settings[ModelFlags]


@pytest.mark.parametrize(
    ("pair", "cure"),
    [
        ("network_dim=8", "give --network_dim=8"),
        ("neuron_dropout=0.1", "give --network_dropout=0.1"),
        ("multiplier=2", "set by the run"),
        ("foo", "expected key=value"),
    ],
)
def test_network_args_that_the_trainer_says_itself_are_refused_with_the_flag(
    refused: Callable[..., list[str]], base: list[str], pair: str, cure: str
) -> None:
    (mistake,) = refused(*base, "--network_args", "conv_dim=4", pair)
    assert mistake.startswith("--network_args: ") and cure in mistake


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "folders belong into --output_dir"),
        ("..\\b", "folders belong into --output_dir"),
        ("a:b", "which names of files cannot have everywhere; leave it out"),
        ("cats ", "begins or ends with a blank"),
        ("..", "ends with a dot"),
        ("con", "is the name of a device on Windows"),
        ("Aux.v1", "is the name of a device on Windows"),
        ("猫" * 67, "it is 201 bytes long, and at most 200"),
    ],
)
def test_a_name_that_files_cannot_have_everywhere_is_refused(
    refused: Refused, base: list[str], name: str, message: str
) -> None:
    (mistake,) = refused(*base, f"--output_name={name}")
    assert mistake.startswith("--output_name: ") and message in mistake


@pytest.mark.parametrize("name", ["cats v1.2 (final)", "猫 é", "a%20b#c", "console", "x" * 200])
def test_other_names_are_taken_as_they_are(read: Read, name: str) -> None:
    assert read(f"--output_name={name}").values()["output_name"] == name
