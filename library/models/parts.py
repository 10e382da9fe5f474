"""Where the parts of a model lie: in one file, or each in a folder of its own, as diffusers has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.files import hub
from library.files.weights import WEIGHT_SUFFIXES, WeightFile, open_weights
from library.models.kinds import kind_of_folder

MODEL_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--vae"


def locate(name: str, flag: str = MODEL_FLAG) -> Path:
    """The file or folder that `name` means; a hub id is fetched.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name; names it and `flag`.
    """
    return hub.locate(name, _hub_files, flag, WEIGHT_SUFFIXES)


def part_folder(path: Path, part: str) -> Path:
    """Where `part` lies: in its own folder, if `path` is a folder of diffusers that has it; else in `path` itself."""
    return path / part if (path / part).is_dir() else path


@contextmanager
def opened_part(path: Path, part: str, family: str) -> Iterator[WeightFile]:
    """The file that holds `part` (a folder's name: unet, vae, ...) of the model at `path`, open.

    Raises:
        FileNotFoundError, ValueError: there is none; says so if it is not of `family`, an architecture's name.
    """
    with open_weights(_part_file(path, part, family)) as file:
        yield file


def _part_file(path: Path, part: str, family: str) -> Path:
    """The file that holds `part` of the model at `path`."""
    if not path.is_dir():
        return path
    folders = [path / part, path] if part == "vae" else [path / part]
    for folder in folders:
        for name in _weight_files(part):
            if (folder / name).is_file():
                return folder / name
    problem = _other_pipeline(path, family) or "a folder of diffusers with unet/, vae/ and text_encoder/ is needed"
    raise ValueError(f"{path} holds no {part}/{_weight_files(part)[0]}: {problem}")


def part_config(path: Path, part: str) -> dict[str, Any]:
    """The config.json of a part; empty for a single file, which has none."""
    file = path / part / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return config


# What a folder of diffusers calls the weights of a part, in the order of preference.
_WEIGHT_NAMES = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
_TOKENIZERS = ("tokenizer/", "tokenizer_2/")
_WEIGHT_ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")


def _weight_files(part: str) -> list[str]:
    return [stem + ending for ending in _WEIGHT_ENDINGS for stem in _WEIGHT_NAMES[part]]


def _hub_files(files: Sequence[str]) -> list[str]:
    """Of the files of a repository, those that are read: one file of weights for each part, and what is small."""
    chosen = [name for name in files if name.startswith(_TOKENIZERS) or name.endswith(("config.json", "_index.json"))]
    for part in _WEIGHT_NAMES:
        candidates = [f"{part}/{name}" for name in _weight_files(part)]
        # An autoencoder may have a repository of its own.
        candidates += _weight_files(part) if part == "vae" else []
        chosen += [name for name in candidates if name in files][:1]
    return chosen


def _other_pipeline(folder: Path, family: str) -> str | None:
    """What a folder of diffusers is by its model_index.json and which script takes it, if it is another family."""
    other = kind_of_folder(folder)
    return None if other is None or family in other.families else f"it is {other.name}: {other.cure}"
