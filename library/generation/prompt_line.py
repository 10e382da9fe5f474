"""What a prompt line or a file of prompts asks for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from library.models.architecture import ImageRequest

logger = logging.getLogger(__name__)

MAX_STEPS = 1000


def parse_prompt_line(line: str, where: str = "prompt") -> ImageRequest:
    """The request in `<prompt> --name value --name value ...`; names ignore case, and the last of two wins.

    An unknown option and a value that is no number are skipped with a warning that begins with `where`.
    """
    prompt, *parts = line.strip().split(" --")
    values: dict[str, Any] = {}
    for part in parts:
        name, _, text = part.partition(" ")
        option = _OPTIONS.get(name.lower())
        if option is None:
            logger.warning("%s: unknown option --%s is left out", where, part)
            continue
        value = option.kind.read(text.strip(), f"{where}: --{part}")
        if value is not None:
            values[option.key] = value
    return _request(prompt, values)


def read_prompts(path: Path) -> list[ImageRequest]:
    """The requests of a .txt (one line each), .toml ([prompt] and [[prompt.subset]]) or .json (a list) file.

    Raises ValueError, naming the file and the place in it, for a file that is missing, malformed or empty.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: a file of prompts ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of prompts")
    try:
        # Some Windows editors start the file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error
    requests = reader(path, text)
    if not requests:
        raise ValueError(f"{path}: holds no prompt")
    return requests


def _read_lines(path: Path, text: str) -> list[ImageRequest]:
    """One prompt a line; a # in the first column makes a comment."""
    return [
        parse_prompt_line(line, f"{path}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    ]


def _read_toml(path: Path, text: str) -> list[ImageRequest]:
    """[prompt] holds what all share; each [[prompt.subset]] is a picture and may say otherwise."""
    try:
        table = toml.loads(text).get("prompt")
    except (toml.TomlDecodeError, IndexError) as error:  # the toml package raises IndexError for some broken lines
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: the table [prompt] with [[prompt.subset]] is missing")
    shared = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ValueError(f"{path}: write each picture as [[prompt.subset]], in double brackets")
    return [
        _from_table(shared | subset, f"{path}, [[prompt.subset]] {number}")
        for number, subset in enumerate(subsets, start=1)
    ]


def _read_json(path: Path, text: str) -> list[ImageRequest]:
    """A list of prompt lines, or of objects with the keys that TOML tables have."""
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: must be a list of prompts, not {type(items).__name__}")
    requests = []
    for number, item in enumerate(items, start=1):
        where = f"{path}, item {number}"
        if isinstance(item, str):
            requests.append(parse_prompt_line(item, where))
        elif isinstance(item, dict):
            requests.append(_from_table(item, where))
        else:
            raise ValueError(f"{where}: must be a prompt line or an object, not {json.dumps(item)}")
    return requests


_READERS: Mapping[str, Callable[[Path, str], list[ImageRequest]]] = {
    ".txt": _read_lines,
    ".toml": _read_toml,
    ".json": _read_json,
}


def _from_table(table: Mapping[str, Any], where: str) -> ImageRequest:
    """A request from keys and values; unknown keys are left out with a warning."""
    prompt = table.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: the key prompt is missing or is no text")
    kinds = {option.key: option.kind for option in _OPTIONS.values()}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("prompt", "enum") or value is None:
            continue
        if key not in kinds:
            logger.warning("%s: unknown key %s is left out", where, key)
            continue
        kind = kinds[key]
        # Unlike in a line, a value that is not of its kind is a mistake: it never made a picture.
        if isinstance(value, bool) or not kind.whole.fullmatch(str(value)):
            raise ValueError(f"{where}: {key} = {value!r} is not {kind.called}")
        converted = kind.convert(str(value))
        if converted is None:
            logger.warning("%s: %s = %r is left out: not %s", where, key, value, kind.called)
        else:
            values[key] = converted
    return _request(prompt, values)


def special_options(request: ImageRequest) -> dict[str, str]:
    """What `request` asks for that only some families know: the key in a file -> the option in a line."""
    keys = set(request.extras) | {key for key in FOR_SOME if getattr(request, _FIELDS[key]) is not None}
    return {option.key: f"--{name}" for name, option in _OPTIONS.items() if option.key in keys}


def _request(prompt: str, values: Mapping[str, Any]) -> ImageRequest:
    named = {_FIELDS[key]: value for key, value in values.items() if key in _FIELDS}
    extras = {key: value for key, value in values.items() if key not in _FIELDS}
    return ImageRequest(prompt, extras=extras, **named)


_FIELDS: Mapping[str, str] = {
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sample_steps": "steps",
    "scale": "scale",
    "guidance_scale": "guidance_scale",
    "sample_sampler": "sampler",
}
"""Keys of prompt files that are fields of a request; the others are extras."""

FOR_SOME = ("guidance_scale", "sample_sampler")
"""Fields that only some families know, as they do extras."""


@dataclass(frozen=True)
class _Kind:
    """How a value is read: in a line the `start` counts and the rest is dropped, in a table the `whole` must fit."""

    called: str
    start: re.Pattern[str]
    whole: re.Pattern[str]
    convert: Callable[[str], Any]

    def read(self, text: str, where: str) -> Any:
        """The value in `text`, or None after a warning."""
        found = self.start.match(text)
        try:
            value = None if found is None else self.convert(found[0])
        except ValueError:
            value = None
        if value is None:
            logger.warning("%s is left out: its value is not %s", where, self.called)
        elif found is not None and found[0] != text:
            logger.warning("%s is read as %s", where, found[0])
        return value


def _steps(text: str) -> int:
    return min(max(int(text), 1), MAX_STEPS)


def _seed(text: str) -> int | None:
    return int(text) if 0 <= int(text) < 2**64 else None


_TEXT = _Kind("text", re.compile(r".+", re.DOTALL), re.compile(r".*", re.DOTALL), str)
_COUNT = _Kind("a whole number", re.compile(r"\d+"), re.compile(r"\d+"), int)
_STEPS = _Kind("a whole number", re.compile(r"\d+"), re.compile(r"\d+"), _steps)
_SEED = _Kind("a whole number from 0 to 2**64 - 1", re.compile(r"-?\d+"), re.compile(r"-?\d+"), _seed)
_FLOAT = _Kind("a number", re.compile(r"[\d.]+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"), float)


@dataclass(frozen=True)
class _Option:
    key: str
    """Its name in .toml and .json files."""
    kind: _Kind


_OPTIONS: Mapping[str, _Option] = {
    "n": _Option("negative_prompt", _TEXT),
    "w": _Option("width", _COUNT),
    "h": _Option("height", _COUNT),
    "d": _Option("seed", _SEED),
    "s": _Option("sample_steps", _STEPS),
    "l": _Option("scale", _FLOAT),
    "g": _Option("guidance_scale", _FLOAT),
    "ss": _Option("sample_sampler", _TEXT),
    "cn": _Option("controlnet_image", _TEXT),
    "ctr": _Option("cfg_trunc_ratio", _FLOAT),
    "rcfg": _Option("renorm_cfg", _FLOAT),
    "fs": _Option("flow_shift", _FLOAT),
}
