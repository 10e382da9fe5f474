"""What a run is going to do, as small tables that the console and the report page show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from library.data.captions import render_caption
from library.data.dataset import TrainingSet
from library.data.items import ImageItem
from library.flags.declare import title
from library.flags.optimizer import OptimizerFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.preview import Previews
from library.train.state import ParameterGroups, Plan
from library.train.trackers import SECRETS

WIDTH = 100
"""Columns of a terminal that the tables fit into."""
SHOWN_CAPTIONS = 3
OFF = (None, False, "", ())


@dataclass(frozen=True)
class Table:
    """A title, a line of headings and lines of cells; `marked` are the lines that stand out."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()

    def text(self) -> str:
        """The table in columns, the last of which is wrapped."""
        widths = [max(map(len, column)) for column in zip(*self.rows)][:-1]
        start = 2 + sum(width + 2 for width in widths)
        lines = []
        for row in self.rows:
            cells = "".join(f"{cell:<{width + 2}}" for cell, width in zip(row, widths, strict=False))
            last = textwrap.wrap(row[-1], max(WIDTH - start, 30), break_long_words=False) or [""]
            lines += [f"  {cells}{last[0]}", *(" " * start + rest for rest in last[1:])]
        return "\n".join([self.title, *lines])


def settings_tables(settings: Settings) -> list[Table]:
    """The settings of each group that are switched on; marked where they differ from the default."""
    tables = []
    for kind, group in settings.groups.items():
        rows: list[tuple[str, str]] = []
        marked: set[int] = set()
        for declared in fields(kind):
            value = getattr(group, declared.name)
            changed = value != declared.default
            if declared.metadata["unavailable"] or declared.metadata["no_effect"] or (value in OFF and not changed):
                continue
            if changed:
                marked.add(len(rows))
            rows.append((declared.name, "(hidden)" if declared.name in SECRETS else shown(value)))
        if rows:
            tables.append(Table(title(kind), ("setting", "value"), tuple(rows), frozenset(marked)))
    return tables


def settings_text(settings: Settings) -> str:
    """All settings in force, several to a line; a star stands before what differs from the default."""
    lines = ["settings in force (* differs from the default; what is off is left out)"]
    for table in settings_tables(settings):
        words = [f"{'*' if i in table.marked else ''}{name}={value}" for i, (name, value) in enumerate(table.rows)]
        start = f"  {table.title + ': ':<24}"
        lines += textwrap.wrap(
            "  ".join(word.replace(" ", "\0") for word in words),
            WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace("\0", " ")


def group_table(groups: ParameterGroups, flags: OptimizerFlags) -> Table:
    """What is trained, and how fast."""
    rows = []
    for group, name in zip(groups.groups, groups.names, strict=True):
        rate = group.get("lr")
        count = sum(parameter.numel() for parameter in group["params"])
        text = f"--learning_rate, {flags.learning_rate:g}" if rate is None else f"{rate:g}"
        rows.append((name, f"{count:,}", f"{len(group['params']):,}", text))
    return Table("parameter groups", ("group", "numbers", "tensors", "learning rate"), tuple(rows))


def plan_table(
    plan: Plan, data: TrainingSet, num_processes: int, previews: Previews, on_disk: Sequence[tuple[str, str]]
) -> Table:
    """How much there is to do, and what it leaves `on_disk`."""
    batch_sizes = ", ".join(str(dataset.settings.batch_size) for dataset in data.datasets)
    rows = [
        ("num train images * repeats", f"{data.num_train_images:,}"),
        ("num reg images", f"{data.num_reg_images:,}"),
        ("batch size per device", batch_sizes),
        ("num batches per epoch", f"{plan.batches_per_epoch:,}"),
        ("gradient accumulation steps", str(plan.accumulation)),
        ("number of processes", str(num_processes)),
        ("num epochs", f"{plan.epochs:,}"),
        ("total optimization steps", f"{plan.steps:,}"),
        *on_disk,
        ("previews", previews_text(plan, previews)),
    ]
    return Table("running training", ("", ""), tuple(rows))


def previews_text(plan: Plan, previews: Previews) -> str:
    """How many pictures there will be."""
    times = int(previews.due_at_start)
    if previews.every_epochs:
        times += plan.epochs // previews.every_epochs
    elif previews.every_steps:
        times += plan.steps // previews.every_steps
    return f"{times} times {len(previews.requests)} pictures" if times and previews.requests else "none"


def bucket_table(data: TrainingSet) -> Table:
    """The sizes that images are trained at, over all datasets."""
    counts: dict[tuple[int, int], list[int]] = {}
    for dataset in data.datasets:
        for bucket in dataset.buckets:
            entry = counts.setdefault(bucket.size, [0, 0, 0])
            entry[0] += len(bucket.items)
            entry[1] += bucket.count
            entry[2] += -(-bucket.count // dataset.settings.batch_size)
    rows = [(f"{w}x{h}", *(f"{number:,}" for number in counts[w, h])) for w, h in sorted(counts)]
    return Table("buckets", ("size", "images", "with repeats", "batches"), tuple(rows))


def caption_table(data: TrainingSet, arch: Architecture, total_steps: int, seed: int) -> Table:
    """Some captions as the first epoch may show them, how many tokens they are, and what is cut off."""
    rows = []
    for item, subset in _spread(_captioned(data), SHOWN_CAPTIONS):
        caption = render_caption(item.caption, subset.captions, Random(seed), epoch=1, step=0, total_steps=total_steps)
        for count in dict.fromkeys(arch.token_counts(caption)):  # encoders that read it alike are one line
            cut = f"; cut off: {count.cut!r}" if count.cut else ""
            rows.append((item.path.name, f"{count.tokens}/{count.room}", f"{caption!r}{cut}"))
    return Table("captions as they are read", ("image", "tokens", "caption"), tuple(rows))


def gigabytes(count: float) -> str:
    """`count` bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def shown(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _captioned(data: TrainingSet) -> list[tuple[ImageItem, Any]]:
    return [
        (item, dataset.settings.subsets[item.subset])
        for dataset in data.datasets
        for item in dataset.items
        if item.caption
    ]


def _spread(entries: Sequence[Any], count: int) -> Iterator[Any]:
    """`count` of the entries, from the first to the last."""
    if len(entries) <= count:
        yield from entries
        return
    for i in range(count):
        yield entries[i * (len(entries) - 1) // max(count - 1, 1)]
