"""What a dataset file may say: its tables, their keys and types, and what is wrong with one."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import toml
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from library.data.kinds import kind_mistakes
from library.flags.config_file import BROKEN_PATH, PATHS_IN_TOML

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


def _true_as_one(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _width_and_height(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("a whole number of pixels or [width, height]")
    return tuple(sides)


def _least_and_most(value: Any) -> Any:
    numbers = [number for number in value if type(number) in (int, float)] if isinstance(value, list) else []
    if len(numbers) != 2 or len(value) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise ValueError("two numbers [least, most], such as [1.0, 3.0]")
    return float(numbers[0]), float(numbers[1])


def _name_of_a_place(value: Any) -> Any:
    if isinstance(value, str) and BROKEN_PATH.match(value):
        raise ValueError(f"the name of a folder or file: {PATHS_IN_TOML}")
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("the name of a folder or file")
    return value


Place = Annotated[str, BeforeValidator(_name_of_a_place)]
Whole = Annotated[int, BeforeValidator(_true_as_one)]
AtLeastZero = Annotated[Whole, Field(ge=0)]
AtLeastOne = Annotated[Whole, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[tuple[int, int], BeforeValidator(_width_and_height)]
Zoom = Annotated[tuple[float, float], BeforeValidator(_least_and_most)]


class Table(BaseModel):
    """A table of the file; None is what the file leaves to the table above it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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
    face_crop_aug_range: Zoom | None = None
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


class SizeKeys(Table):
    """Keys about sizes and batches; they may stand in [general] and [[datasets]]."""

    batch_size: AtLeastOne | None = None
    bucket_no_upscale: bool | None = None
    bucket_reso_steps: AtLeastOne | None = None
    enable_bucket: bool | None = None
    max_bucket_reso: AtLeastOne | None = None
    min_bucket_reso: AtLeastOne | None = None
    network_multiplier: float | None = None
    resolution: Resolution | None = None


class DatasetKeys(SizeKeys):
    """Keys about whole datasets; they may stand in [general] and [[datasets]]."""

    validation_seed: Whole | None = None
    validation_split: Share | None = None


class GeneralTable(ImageKeys, DatasetKeys):
    """[general]"""


class SubsetTable(ImageKeys):
    """[[datasets.subsets]]"""

    alpha_mask: bool | None = None
    conditioning_data_dir: Place | None = None
    image_dir: Place | None = None
    is_reg: bool | None = None
    metadata_file: Place | None = None


class DatasetTable(ImageKeys, DatasetKeys):
    """[[datasets]]"""

    subsets: list[SubsetTable]


class ValidationTable(ImageKeys, SizeKeys):
    """[validation], the older way to say which images are held out"""

    subsets: list[SubsetTable]


class DatasetFile(Table):
    """The file."""

    general: GeneralTable | None = None
    datasets: Annotated[list[DatasetTable], Field(min_length=1)]
    validation: ValidationTable | None = None

    def all_datasets(self) -> list[tuple[str, DatasetTable | ValidationTable]]:
        """Every dataset with its place in the file; [validation] comes last."""
        numbered: list[tuple[str, DatasetTable | ValidationTable]] = [
            (f"[[datasets]] {number}", table) for number, table in enumerate(self.datasets, 1)
        ]
        return numbered + ([("[validation]", self.validation)] if self.validation else [])


TABLES: dict[str, type[Table]] = {
    "[general]": GeneralTable,
    "[[datasets]]": DatasetTable,
    "[[datasets.subsets]]": SubsetTable,
}


def read_dataset_file(path: Path, *, conditioning: bool = False) -> DatasetFile:
    """Read and check a dataset .toml or .json; every mistake in it is named in one ValueError.

    Without `conditioning` the run has no use for conditioning images, and naming some is a mistake.
    """
    content = _parse(path)
    try:
        tables = DatasetFile.model_validate(content)
    except ValidationError as error:
        mistakes = [_describe(path_of_error) for path_of_error in error.errors()]
    else:
        mistakes = []
        for place, table in tables.all_datasets():
            subsets = [
                (f"{_subset_name(place)} {number} of {place}", given(subset))
                for number, subset in enumerate(table.subsets, 1)
            ]
            mistakes += kind_mistakes(given(table), subsets, place, conditioning=conditioning)
            if place == "[validation]":
                mistakes += [
                    f"{name}: is_reg = True; images that are held out are no such images"
                    for name, subset in subsets
                    if subset.get("is_reg")
                ]
    if mistakes:
        raise ValueError(one_message(f"{path}", mistakes))
    return tables


def given(table: Table) -> dict[str, Any]:
    """The keys that a table says something about."""
    return table.model_dump(exclude_none=True, exclude={"subsets"})


def one_message(source: str, mistakes: list[str]) -> str:
    """All mistakes of one source, one in a line."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return f"{source}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes)


BROKEN = (ValueError, IndexError, TypeError, RecursionError)
"""What the toml and json packages raise on a file that is not well-formed."""


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
        content = toml.loads(text) if kind == ".toml" else json.loads(text, object_pairs_hook=_without_twins)
    except BROKEN as error:
        hint = f"; {PATHS_IN_TOML}" if kind == ".toml" and "\\" in text else ""
        raise ValueError(f"{path}: not a valid {kind} file: {error}{hint}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected tables general and datasets, got a {type(content).__name__}")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a JSON table; of a key that stands in it twice the first would be lost in silence."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} stands twice in one table")
    return dict(pairs)


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
        name = "datasets" if key == "datasets" else f"{table[0]}.subsets"
        return f"{place}: write [[{name}]] in double brackets, since there may be several"
    if error["type"] == "too_short" and key in ("datasets", "subsets"):
        return f"{place}: {key} = {value}; expected at least one table"
    if isinstance(key, int) and error["type"] in ("model_type", "model_attributes_type"):
        return f"{_place([*table, key])[0]}: expected a table, got {value}"
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
    if table[0] == "validation":
        place = f"[[validation.subsets]] {numbers[0]} of [validation]" if numbers else "[validation]"
        return place, SubsetTable if numbers else ValidationTable
    if len(numbers) == 2:
        return f"[[datasets.subsets]] {numbers[1]} of [[datasets]] {numbers[0]}", SubsetTable
    return (f"[[datasets]] {numbers[0]}" if numbers else "[[datasets]]"), DatasetTable


def _subset_name(place: str) -> str:
    return "[[validation.subsets]]" if place == "[validation]" else "[[datasets.subsets]]"


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
