"""Do prompt lines and prompt files ask for what they say?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from library.generation.prompt_line import parse_prompt_line, read_prompts
from library.models.architecture import ImageRequest

FACTS = Path(__file__).resolve().parents[2] / "facts" / "prompts" / "prompt_lines.json"
CASES = json.loads(FACTS.read_text(encoding="utf-8"))["cases"]
MENDED: dict[str, dict[str, Any]] = {
    "w 640 wide shot": {},
    "D 5 dice on table": {},
    "n nice": {},
    "s 20 people": {},
    "a --fs 4.0": {"flow_shift": 4.0},
}
"""Lines whose recorded reading was a mistake: a prompt is no option, and every number is a number."""


def spelled(request: ImageRequest) -> dict[str, Any]:
    """What a request says, by the keys of prompt files."""
    values = {
        "negative_prompt": request.negative_prompt or None,
        "width": request.width,
        "height": request.height,
        "seed": request.seed,
        "sample_steps": request.steps,
        "scale": request.scale,
        "guidance_scale": request.guidance_scale,
        "sample_sampler": request.sampler,
    }
    return {"prompt": request.prompt} | {k: v for k, v in values.items() if v is not None} | dict(request.extras)


@pytest.mark.parametrize("case", CASES, ids=[case["line"] for case in CASES])
def test_a_line_reads_as_recorded_or_as_mended(case: dict[str, Any]) -> None:
    line, parsed = case["line"], case["parsed"]
    if line in MENDED:
        parsed = {"prompt": parsed["prompt"]} | MENDED[line]
    assert spelled(parse_prompt_line(line)) == parsed


def test_seed_zero_is_a_seed() -> None:
    assert parse_prompt_line("a --d 0").seed == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --x 3", "unknown option --x 3 is left out"),
        ("a --w512", "unknown option --w512 is left out"),
        ("a --l x", "--l x is left out: its value is not a number"),
        ("a --l 1.2.3", "--l 1.2.3 is left out: its value is not a number"),
        ("a --d -1", "--d -1 is left out: its value is not a whole number from 0 to 2**64 - 1"),
        (
            "a --d 18446744073709551616",
            "--d 18446744073709551616 is left out: its value is not a whole number from 0 to 2**64 - 1",
        ),
        ("a --n", "--n is left out: its value is not text"),
        ("a --w 512px", "--w 512px is read as 512"),
    ],
)
def test_what_is_left_out_is_said_with_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, message: str
) -> None:
    file = tmp_path / "p.txt"
    file.write_text(f"first\n{line}\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert len(read_prompts(file)) == 2
    assert [record.getMessage() for record in caplog.records] == [f"{file}, line 2: {message}"]


def test_a_text_file_has_a_prompt_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.TXT"
    file.write_text("\ufeff# comment\n\na 猫 --d 1\n #2 pencil\n", encoding="utf-8")
    assert [(r.prompt, r.seed) for r in read_prompts(file)] == [("a 猫", 1), ("#2 pencil", None)]


def test_a_subset_may_say_otherwise_than_the_shared_table(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        "[prompt]\nwidth = 768\nscale = 7\nseed = 0\n"
        '[[prompt.subset]]\nprompt = "a"\n'
        '[[prompt.subset]]\nprompt = "b --w 5"\nwidth = 512\nflow_shift = 3.5\nseed = -1\n',
        encoding="utf-8",
    )
    first, second = read_prompts(file)
    assert spelled(first) == {"prompt": "a", "width": 768, "scale": 7.0, "seed": 0}
    assert spelled(second) == {"prompt": "b --w 5", "width": 512, "scale": 7.0, "flow_shift": 3.5}


def test_a_table_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[prompt]\nprompt = "a"\nsample_steps = 5000\n', encoding="utf-8")
    assert [spelled(request) for request in read_prompts(file)] == [{"prompt": "a", "sample_steps": 1000}]


def test_json_holds_lines_and_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "p.json"
    items = ["a --s 8", {"prompt": "b", "negative_prompt": None, "scale": 1e-05, "color": "red", "enum": 3}]
    file.write_text(json.dumps(items), encoding="utf-8")
    first, second = read_prompts(file)
    assert first.steps == 8
    assert spelled(second) == {"prompt": "b", "scale": 1e-05}
    assert [record.getMessage() for record in caplog.records] == [f"{file}, item 2: unknown key color is left out"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a", "ends in .txt, .toml, .json"),
        ("p.txt", "# only a comment\n", "holds no prompt"),
        ("p.toml", "[prompt", "not valid TOML"),
        ("p.toml", "width = 3", r"the table \[prompt\]"),
        ("p.toml", "[prompt]\nwidth = 3\n[[prompt.subset]]\n", r"\[\[prompt.subset\]\] 1: the key prompt is missing"),
        ("p.toml", '[prompt]\n[prompt.subset]\nprompt = "a"\n', "in double brackets"),
        ("p.toml", '[prompt]\nprompt = "a"\nwidth = "wide"\n', "width = 'wide' is not a whole number"),
        ("p.toml", '[prompt]\nprompt = "a"\nscale = true\n', "scale = True is not a number"),
        ("p.json", '{"prompt": "a"}', "must be a list of prompts, not dict"),
        ("p.json", "[3]", "item 1: must be a prompt line or an object, not 3"),
        ("p.json", "[", "not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(file)
    assert str(error.value).startswith(str(file))


def test_missing_files_and_other_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
