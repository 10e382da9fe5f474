"""What a dataset file may say: its tables, their keys and types, and what is wrong with one."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import toml
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


def _true_as_one(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _width_and_height(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("a whole number of pixels or [width, height]")
    return tuple(sides)


Whole = Annotated[int, BeforeValidator(_true_as_one)]
AtLeastZero = Annotated[Whole, Field(ge=0)]
AtLeastOne = Annotated[Whole, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[tuple[int, int], BeforeValidator(_width_and_height)]


class Table(BaseModel):
    """A table of the file; None is what the file leaves to the table above it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageKeys(Table):
    """Keys about single images; they may stand in [general], [[datasets]] and [[datasets.subsets]]."""

    cache_info: bool | None = None
    caption_dropout_every_n_epochs: AtLeastZero | None = None
    caption_dropout_rate: Share | None = None
    caption_extension: str | None = None
    caption_prefix: str | None = None
    caption_separator: str | None = None
    caption_suffix: str | None = None
    caption_tag_dropout_rate: Share | None = None
    class_tokens: str | None = None
    color_aug: bool | None = None
    custom_attributes: dict[str, Any] | None = None
    enable_wildcard: bool | None = None
    face_crop_aug_range: list[float] | None = None
    flip_aug: bool | None = None
    keep_tokens: AtLeastZero | None = None
    keep_tokens_separator: str | None = None
    num_repeats: Whole | None = None
    random_crop: bool | None = None
    resize_interpolation: Interpolation | None = Field(
        None, validation_alias=AliasChoices("resize_interpolation", "interpolation_type")
    )
    secondary_separator: str | None = None
    shuffle_caption: bool | None = None
    token_warmup_min: AtLeastZero | None = None
    token_warmup_step: Annotated[float, Field(ge=0)] | None = None


class DatasetKeys(Table):
    """Keys about whole datasets; they may stand in [general] and [[datasets]]."""

    batch_size: AtLeastOne | None = None
    bucket_no_upscale: bool | None = None
    bucket_reso_steps: AtLeastOne | None = None
    enable_bucket: bool | None = None
    max_bucket_reso: AtLeastOne | None = None
    min_bucket_reso: AtLeastOne | None = None
    network_multiplier: float | None = None
    resolution: Resolution | None = None
    validation_seed: Whole | None = None
    validation_split: Share | None = None


class GeneralTable(ImageKeys, DatasetKeys):
    """[general]"""


class SubsetTable(ImageKeys):
    """[[datasets.subsets]]"""

    alpha_mask: bool | None = None
    conditioning_data_dir: str | None = None
    image_dir: str | None = None
    is_reg: bool | None = None
    metadata_file: str | None = None


class DatasetTable(ImageKeys, DatasetKeys):
    """[[datasets]]"""

    subsets: list[SubsetTable]


class DatasetFile(Table):
    """The file."""

    general: GeneralTable | None = None
    datasets: Annotated[list[DatasetTable], Field(min_length=1)]


NOT_AVAILABLE_YET = {
    "alpha_mask": "masks from the alpha channel",
    "cache_info": "a file of captions and image sizes",
    "color_aug": "random changes of colour",
    "conditioning_data_dir": "conditioning images and masks",
    "face_crop_aug_range": "crops around faces",
    "metadata_file": "captions in one file",
    "validation_seed": "held-out images",
    "validation_split": "held-out images",
}
"""Keys that are known but cannot be used yet, with what they are for; false and 0 ask for nothing."""

TABLES: dict[str, type[Table]] = {
    "[general]": GeneralTable,
    "[[datasets]]": DatasetTable,
    "[[datasets.subsets]]": SubsetTable,
}


def read_dataset_file(path: Path) -> DatasetFile:
    """Read and check a dataset .toml or .json; every mistake in it is named in one ValueError."""
    content = _parse(path)
    try:
        tables = DatasetFile.model_validate(content)
    except ValidationError as error:
        mistakes = [_describe(path_of_error) for path_of_error in error.errors()]
    else:
        mistakes = _unavailable(tables)
        mistakes += [
            f"{place}: image_dir is missing; it names the folder of the images"
            for place, table in _places(tables)
            if isinstance(table, SubsetTable) and table.image_dir is None and table.metadata_file is None
        ]
    if mistakes:
        raise ValueError(one_message(f"{path}", mistakes))
    return tables


def one_message(source: str, mistakes: list[str]) -> str:
    """All mistakes of one source, one in a line."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return f"{source}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes)


def _parse(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if kind not in (".toml", ".json"):
        raise ValueError(f"--dataset_config {path}: expected a file that ends in .toml or .json")
    if not path.is_file():
        raise ValueError(f"--dataset_config {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        content = toml.loads(text) if kind == ".toml" else json.loads(text)
    except (
        ValueError,
        IndexError,
        TypeError,
    ) as error:  # the toml package trips over some mistakes with the latter two
        hint = "; Windows paths go in single quotes: 'C:\\images'" if kind == ".toml" and "\\" in text else ""
        raise ValueError(f"{path}: not a valid {kind} file: {error}{hint}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected tables general and datasets, got a {type(content).__name__}")
    return content


def _describe(error: Any) -> str:
    """One line for one pydantic error: table, key, value, what was expected."""
    *table, key = error["loc"]
    place, known = _place(table)
    value = _shown(error["input"])
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {key} = {value}; {_advice(str(key), known)}"
    if error["type"] == "missing":
        return f"{place}: {key} is missing; write [[datasets]] and under it [[datasets.subsets]] with image_dir"
    if error["type"] == "list_type" and key in ("datasets", "subsets"):
        name = "datasets" if key == "datasets" else "datasets.subsets"
        return f"{place}: write [[{name}]] in double brackets, since there may be several"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if isinstance(key, int):
        place, key = _place(table[:-1])[0], table[-1]
    return f"{place}: {key} = {value}; expected {expected}"


def _place(table: list[Any]) -> tuple[str, type[Table] | None]:
    """How the table at a pydantic location is written, and its model."""
    numbers = [part + 1 for part in table if isinstance(part, int)]
    if not table:
        return "top level", DatasetFile
    if table[0] == "general":
        return "[general]", GeneralTable
    if len(numbers) == 2:
        return f"[[datasets.subsets]] {numbers[1]} of [[datasets]] {numbers[0]}", SubsetTable
    return (f"[[datasets]] {numbers[0]}" if numbers else "[[datasets]]"), DatasetTable


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _advice(key: str, known: type[Table] | None) -> str:
    """Where a key that the table does not know belongs, or the nearest key that it knows."""
    homes = [name for name, table in TABLES.items() if key in table.model_fields]
    if homes:
        return f"it belongs in {' or '.join(homes)}"
    if key == "prior_loss_weight":
        return "it is a flag of the command line, --prior_loss_weight"
    names = list(known.model_fields) if known else []
    nearest = difflib.get_close_matches(key, names, n=1) or difflib.get_close_matches(key, _all_keys(), n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"known keys are {', '.join(sorted(names))}"


def _all_keys() -> list[str]:
    return sorted({key for table in TABLES.values() for key in table.model_fields})


def _places(tables: DatasetFile) -> list[tuple[str, Table]]:
    places: list[tuple[str, Table]] = [("[general]", tables.general)] if tables.general else []
    for i, dataset in enumerate(tables.datasets, 1):
        places.append((f"[[datasets]] {i}", dataset))
        places += [(f"[[datasets.subsets]] {j} of [[datasets]] {i}", s) for j, s in enumerate(dataset.subsets, 1)]
    return places


def _unavailable(tables: DatasetFile) -> list[str]:
    return [
        f"{place}: {key} = {_shown(value)} is not available yet ({NOT_AVAILABLE_YET[key]})"
        for place, table in _places(tables)
        for key, value in table.model_dump(exclude={"subsets"}, exclude_none=True).items()
        if key in NOT_AVAILABLE_YET and value is not False and not (key == "validation_split" and value == 0)
    ]
