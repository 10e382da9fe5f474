from __future__ import annotations

import pytest

from library.flags.command_line import CommandLine, words_for
from library.flags.declare import declared_flags
from library.flags.trainers import TRAIN_NETWORK

FLAGS = declared_flags(TRAIN_NETWORK)


@pytest.fixture(scope="module")
def command_line() -> CommandLine:
    return CommandLine(TRAIN_NETWORK, "a test", {})


def test_only_what_was_said_is_read(command_line: CommandLine) -> None:
    reading = command_line.read(["--seed", "3", "--v2", "--text_encoder_lr", "1e-4", "5e-5", "--noise_offset", "-0.1"])
    assert reading.values == {"seed": 3, "v2": True, "text_encoder_lr": (1e-4, 5e-5), "noise_offset": -0.1}
    assert reading.errors == []


def test_the_last_of_equal_flags_wins(command_line: CommandLine) -> None:
    assert command_line.read(["--seed=1", "--seed", "2"]).values == {"seed": 2}


def test_a_flag_may_be_shortened(command_line: CommandLine) -> None:
    assert command_line.read(["--learning", "0.5", "--flip"]).values == {"learning_rate": 0.5, "flip_aug": True}


def test_a_value_with_a_blank_may_begin_like_a_flag(command_line: CommandLine) -> None:
    assert command_line.read(["--training_comment", "--a b"]).values == {"training_comment": "--a b"}


def test_an_empty_text_leaves_a_flag_off(command_line: CommandLine) -> None:
    assert command_line.read(["--vae=", "--caption_separator="]).values == {"vae": None, "caption_separator": ""}
    assert command_line.read(["--vae=a", "--vae="]).values == {"vae": None}


def test_every_mistake_is_reported_and_the_rest_is_still_read(command_line: CommandLine) -> None:
    reading = command_line.read(
        [
            "--seed",
            "a",
            "--loss_type=l3",
            "--netwrk_dim",
            "4",
            "--v2=true",
            "--v2",
            "no",
            "--clip_skip",
            "--output_name=x",
        ]
    )
    assert reading.values == {"output_name": "x"}
    assert reading.failed >= {"seed", "loss_type", "v2", "clip_skip"}
    starts = ["--seed: invalid int", "--loss_type: invalid choice", "--netwrk_dim is not", "--v2 is a switch:"]
    starts += ["--v2 is a switch and takes no value, but 'no' follows", "--clip_skip: expected one argument"]
    assert [error.startswith(start) for error, start in zip(reading.errors, starts, strict=True)] == [True] * 6


def test_an_unknown_flag_names_the_nearest(command_line: CommandLine) -> None:
    assert command_line.read(["--netwrk_dim", "4"]).errors == [
        "--netwrk_dim is not a flag of this script; did you mean --network_dim?"
    ]


def test_an_unknown_flag_near_to_nothing_points_to_the_help(command_line: CommandLine) -> None:
    assert command_line.read(["--qqq"]).errors == ["--qqq is not a flag of this script; --help lists them all"]


def test_a_stray_word_is_a_mistake(command_line: CommandLine) -> None:
    assert "'stray' belongs to no flag" in command_line.read(["stray", "--seed=1"]).errors[0]
    assert (
        "--output_name takes one value, but 'lora' follows"
        in command_line.read(["--output_name", "my", "lora"]).errors[0]
    )


def test_an_ambiguous_short_form_is_a_mistake(command_line: CommandLine) -> None:
    assert command_line.read(["--cache", "1"]).errors[0].startswith("ambiguous option: --cache could match")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("v2", True, ["--v2"]),
        ("v2", False, []),
        ("persistent_data_loader_workers", 1, ["--persistent_data_loader_workers"]),
        ("resolution", 512, ["--resolution=512"]),
        ("resolution", [512, 768], ["--resolution=512,768"]),
        ("learning_rate", 1e-4, ["--learning_rate=0.0001"]),
        ("text_encoder_lr", 1e-5, ["--text_encoder_lr", "1e-05"]),
        ("text_encoder_lr", [1, 2], ["--text_encoder_lr", "1", "2"]),
        ("network_args", ["a=1"], ["--network_args", "a=1"]),
        ("network_args", [], ["--network_args"]),
        ("max_train_steps", 100.0, ["--max_train_steps=100"]),
        ("lr_warmup_steps", 1.0, ["--lr_warmup_steps=1.0"]),
        ("lr_warmup_steps", 1, ["--lr_warmup_steps=1"]),
        ("vae", "", []),
        ("output_name", 5, ["--output_name=5"]),
    ],
)
def test_a_value_of_a_file_is_said_as_words(name: str, value: object, words: list[str]) -> None:
    assert words_for(FLAGS[name], value) == words


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("v2", "yes", "expected true or false, got 'yes'"),
        ("output_name", True, "expected text or a number, got true"),
        ("output_name", ["a", "b"], "expected one value"),
        ("network_args", [["a=1"]], "expected text or a number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words_for(FLAGS[name], value)
