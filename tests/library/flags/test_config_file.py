from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import toml

from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_config(content: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(content, encoding="utf-8")
        return f"--config_file={path}"

    return write_config


def test_sections_are_flattened_and_the_command_line_wins(read: Read, write: Callable[[str], str]) -> None:
    file = write("seed = 1\n[steps]\nmax_train_steps = 10\n[training]\nlearning_rate = 1e-4\nflip_aug = true\n")
    values = read(file, "--seed=2").values()
    assert (values["seed"], values["max_train_steps"], values["learning_rate"]) == (2, 10, 1e-4)
    assert values["flip_aug"] is True


def test_an_empty_text_on_the_command_line_switches_off_what_the_file_says(
    read: Read, write: Callable[[str], str]
) -> None:
    settings = read(write("network_dropout = 0.5\ntraining_comment = 'from the file'"), "--training_comment=")
    assert settings.values()["network_dropout"] == 0.5
    assert settings.values()["training_comment"] is None and not settings.given("training_comment")


def test_the_ending_may_be_left_out(read: Read, write: Callable[[str], str]) -> None:
    assert read(write("seed = 5").removesuffix(".toml")).values()["seed"] == 5


def test_numbers_and_lists_stand_where_the_command_line_takes_text(read: Read, write: Callable[[str], str]) -> None:
    file = write(
        "network_args = ['conv_dim=4', 'conv_alpha=1']\ntext_encoder_lr = 1e-5\n"
        "lr_warmup_steps = 0.1\nlr_scheduler = 'cosine'\nmax_train_steps = 100.0\npersistent_data_loader_workers = 1\n"
        "v2 = false\nvae = ''\n"
    )
    settings = read(file)
    values = settings.values()
    assert values["network_args"] == ("conv_dim=4", "conv_alpha=1")
    assert values["text_encoder_lr"] == (1e-5,)
    assert values["lr_warmup_steps"] == 0.1
    assert values["max_train_steps"] == 100 and isinstance(values["max_train_steps"], int)
    assert values["persistent_data_loader_workers"] is True
    assert not settings.given("v2") and not settings.given("vae")


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("[512, 768]", (512, 768)), ("'640,512'", (640, 512))])
def test_a_resolution_may_be_a_number_a_list_or_text(
    base: list[str], write: Callable[[str], str], text: str, size: tuple[int, int]
) -> None:
    words = [word for word in base if not word.startswith("--resolution")]
    settings = read_settings(TRAIN_NETWORK, "a test", argv=[*words, write(f"resolution = {text}")])
    assert settings.values()["resolution"] == size


def test_a_warm_up_of_one_point_nought_is_the_whole_run(read: Read, write: Callable[[str], str]) -> None:
    value = read(write("lr_warmup_steps = 1.0\nlr_scheduler = 'cosine'")).values()["lr_warmup_steps"]
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat = 1e-4", "learning_rat is not a flag of this script; did you mean learning_rate?"),
        ("mixed_precision = 'bf17'", "mixed_precision: invalid choice: 'bf17'"),
        ("network_dim = 'sixteen'", "network_dim: invalid int value: 'sixteen'"),
        ("max_train_steps = 1.5", "max_train_steps: invalid int value: '1.5'"),
        ("v2 = 'yes'", "v2: expected true or false, got 'yes'"),
        ("seed = true", "seed: expected text or a number, got true"),
        ("loraplus_lr_ratio = 16", "it belongs in network_args, as 'loraplus_lr_ratio=16'"),
        ("[a.b]\nseed = 1", "b is not a flag of this script"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(
    refused: Refused, base: list[str], write: Callable[[str], str], tmp_path: Path, line: str, message: str
) -> None:
    (mistake,) = refused(*base, write(line))
    assert mistake.startswith(f"{tmp_path / 'run.toml'}: ")
    assert message in mistake


def test_a_key_cannot_be_shortened(refused: Refused, base: list[str], write: Callable[[str], str]) -> None:
    assert "did you mean learning_rate?" in refused(*base, write("learning = 1e-4"))[0]


def test_rules_and_bounds_hold_in_the_file_too(refused: Refused, base: list[str], write: Callable[[str], str]) -> None:
    assert refused(*base, write("dim_from_weights = true\nsave_every_n_epochs = 0")) == [
        "--save_every_n_epochs: must be at least 1, got 0",
        "--dim_from_weights needs --network_weights, the file to take ranks from",
    ]


def test_notes_of_the_program_that_wrote_the_file_are_passed_over(read: Read, write: Callable[[str], str]) -> None:
    settings = read(write("epoch = 1\nnoise_offset_type = 'Original'\ndynamo_backend = 'no'\nmax_token_length = 75\n"))
    assert settings.values()["dynamo_backend"] == "inductor"
    assert not settings.given("dynamo_backend")


def test_a_key_that_stands_there_twice_warns(read: Read, write: Callable[[str], str]) -> None:
    settings = read(write("seed = 1\n[a]\nseed = 2\n"))
    assert settings.values()["seed"] == 2
    assert settings.warnings[0].endswith("seed stands there twice; the one in [a] is used")


def test_a_missing_file_is_named(refused: Refused, base: list[str], tmp_path: Path) -> None:
    assert refused(*base, f"--config_file={tmp_path / 'gone'}") == [
        f"--config_file: there is no file {tmp_path / 'gone.toml'}"
    ]


def test_a_file_that_is_no_toml_is_named(refused: Refused, base: list[str], write: Callable[[str], str]) -> None:
    (mistake,) = refused(*base, write("output_dir = 'x"))
    assert "run.toml cannot be read as TOML" in mistake
    (mistake,) = refused(*base, write("seed = 1\nseed = 2"))
    assert "Duplicate keys! (line 2" in mistake and "quotes" not in mistake
    (mistake,) = refused(*base, write('vae = "C:\\new\\vae.safetensors"'))
    assert mistake.endswith("in TOML a path with \\ stands in 'single quotes'")


def test_a_file_in_another_encoding_is_named_with_the_cure(refused: Refused, base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes("training_comment = 'café'".encode("latin-1"))
    assert refused(*base, f"--config_file={file}") == [
        f"{file} is not UTF-8 text (invalid continuation byte at byte 23); save it as UTF-8"
    ]


def test_text_outside_of_ascii_is_read(read: Read, write: Callable[[str], str]) -> None:
    assert read(write("training_comment = '猫 é'")).values()["training_comment"] == "猫 é"


def test_output_config_writes_what_differs_from_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sub" / "new.toml"
    words = ["--resolution=512,768", "--network_args", "conv_dim=4", "--train_batch_size=1", "--use_8bit_adam"]
    words += ["--wandb_api_key=secret", "--lr_warmup_steps=10%", "--dataset_config=data.toml", "--flip_aug"]
    with pytest.raises(SystemExit) as end:
        read_settings(TRAIN_NETWORK, "a test", argv=[*words, f"--config_file={path}", "--output_config"])
    assert end.value.code == 0
    assert str(path) in capsys.readouterr().err
    assert toml.loads(path.read_text(encoding="utf-8")) == {
        "resolution": "512,768",
        "network_args": ["conv_dim=4"],
        "optimizer_type": "AdamW8bit",
        "lr_warmup_steps": 0.1,
        "dataset_config": "data.toml",
        "flip_aug": True,
    }


def test_output_config_is_read_back_as_the_same_settings(read: Read, base: list[str], tmp_path: Path) -> None:
    words = ["--text_encoder_lr", "1e-5", "2e-5", "--lr_warmup_steps=100%", "--lr_scheduler=linear", "--seed=3"]
    path = f"--config_file={tmp_path / 'saved'}"
    with pytest.raises(SystemExit):
        read_settings(TRAIN_NETWORK, "a test", argv=[*base, *words, path, "--output_config"])
    again = read_settings(TRAIN_NETWORK, "a test", argv=[path]).values()
    assert again | {"config_file": None} == read(*words).values()


def test_output_config_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.toml"
    path.write_text("seed = 1", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        read_settings(TRAIN_NETWORK, "a test", argv=["--seed=2", f"--config_file={path}", "--output_config"])
    assert end.value.code == 1
    assert f"{path} exists and is not overwritten" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "seed = 1"


def test_output_config_needs_a_file_to_write(refused: Refused) -> None:
    assert refused("--output_config")[0] == "--output_config needs --config_file, the file to write"


@pytest.mark.parametrize("line", ['output_dir = "C:\\train\\new"', 'base_weights = ["D:\\first.safetensors"]'])
def test_a_path_of_windows_that_became_tabs_and_line_breaks_is_refused(
    refused: Refused, write: Callable[[str], str], line: str
) -> None:
    mistakes = refused(write(line))
    assert any(line.split()[0] in mistake and "'single quotes'" in mistake for mistake in mistakes)
