"""A tool ends with a code and one line, and leaves logging as it was."""

from __future__ import annotations

import argparse
import logging

import pytest

from library.flags.tool import at_least_one, run_tool, two_numbers


def ending(error: Exception | None) -> int:
    def work(arguments: argparse.Namespace) -> None:
        logging.getLogger("library.x").info("at work")
        logging.getLogger("PIL.x").info("noise")
        if error is not None:
            raise error

    return run_tool(argparse.ArgumentParser(), work, [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (ValueError("x.png: not an image"), 1, "ERROR: x.png: not an image\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 1, "ERROR: a.json: No such file or directory\n"),
        (OSError("disk full"), 1, "ERROR: disk full\n"),
    ],
)
def test_the_code_and_the_line_say_how_it_ended(
    error: Exception | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(error) == code
    assert capsys.readouterr().err == f"INFO: at work\n{line}"


def test_a_mistake_of_the_program_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        ending(KeyError("x"))


def test_logging_is_as_it_was_afterwards() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    assert ending(ValueError("x")) == 1
    assert (root.level, root.handlers) == before


@pytest.mark.parametrize("text", ["512,768", "512x768", "512X768", " 512, 768"])
def test_two_numbers(text: str) -> None:
    assert two_numbers(text) == (512, 768)


@pytest.mark.parametrize("text", ["512", "a,b", "0,5", "1,2,3", "", "-1,5", "1.5,2"])
def test_what_is_not_two_numbers_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected two whole numbers"):
        two_numbers(text)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ""])
def test_what_is_not_a_count_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        at_least_one(text)
    assert at_least_one("3") == 3
