"""The page of the dataset doctor: one HTML file with numbers and pictures that asks nothing of any other place."""

from __future__ import annotations

import base64
import io
from collections import Counter
from html import escape
from pathlib import Path
from random import Random

from PIL import Image

from library.data.captions import render_caption
from library.data.image_set import Bucket, ImageSet
from library.data.items import ImageItem
from library.data.pixels import make_picture
from library.data.report import Collection, Finding, Severity, counted
from library.data.report_text import length_of_run, line_of, shape_of, verdict
from library.data.summary import tag_frequency

PER_BUCKET, PER_PAGE = 24, 240
"""Pictures on the contact sheet of a bucket, and on the whole page."""
LONG_SIDE = 160
"""Pixels of a picture on a contact sheet."""
NUM_REMARKS, NUM_TAGS, NUM_CAPTIONS = 100, 40, 3
STYLE = r"""
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --dim: #57606a; --line: #d8dee4; --bar: #2f6fb0;
  --stops: #b3261e; --hurts: #9a5b00; --note: #3d6b35; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e6e9ec; --dim: #a1abb5; --line: #343b43;
  --bar: #5b9bd8; --stops: #ff8a80; --hurts: #f0b45a; --note: #8ccf80; --card: #1d2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1200px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .3rem 0; }
.dim, figcaption { color: var(--dim); }
.finding { margin: .6rem 0; padding: .5rem .9rem; background: var(--card); border-left: 4px solid var(--line); }
.stops { border-color: var(--stops); } .hurts { border-color: var(--hurts); } .note { border-color: var(--note); }
.stops b { color: var(--stops); } .hurts b { color: var(--hurts); } .note b { color: var(--note); }
.finding b { margin-right: .5rem; font-size: .85rem; text-transform: uppercase; letter-spacing: .03em; }
.finding ul { margin: .3rem 0; padding-left: 1.3rem; max-height: 15rem; overflow: auto; overflow-wrap: anywhere; }
.chart { max-width: 100%; height: auto; } .chart text { fill: var(--text); font-size: 13px; }
.chart rect { fill: var(--bar); }
.tags { columns: 15rem; padding: 0; list-style: none; margin: 0; overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: .8rem; }
figure { margin: 0; padding: .6rem; background: var(--card); overflow-wrap: anywhere; font-size: .8rem; }
figure img { display: block; max-width: 100%; margin: 0 auto .4rem; }
figcaption b { color: var(--text); font-weight: 600; }
figcaption ol { margin: .2rem 0 0; padding-left: 1.4rem; max-height: 16rem; overflow: auto; }
.cure::before { content: "\2192\00a0"; }
"""


def as_page(seen: Collection, findings: list[Finding], seed: int = 0) -> str:
    """The whole page; it holds PER_PAGE pictures of a few kilobytes at most, or one for each bucket."""
    name = str(seen.config.file or "folders of the command line")
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_safe(name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_safe(name)}</h1><p>{_safe(verdict(findings))}</p>",
        f'<p class="dim">{_safe(length_of_run(seen))}</p>',
        *(_finding(finding) for finding in findings),
    ]
    room = max(PER_PAGE // max(sum(len(dataset.buckets) for dataset in seen.datasets), 1), 1)
    for number, dataset in enumerate(seen.datasets, 1):
        parts.append(f"<h2>Dataset {number}</h2><p>{_safe(shape_of(dataset))}</p>")
        parts += [_histogram(dataset), _tags(dataset)]
        parts += [_sheet(bucket, dataset, seen, seed, min(PER_BUCKET, room)) for bucket in dataset.buckets]
    return "\n".join([*parts, "</body></html>\n"])


def _finding(finding: Finding) -> str:
    rows = "".join(f"<li>{_safe(line_of(remark))}</li>" for remark in finding.remarks[:NUM_REMARKS])
    more = len(finding.remarks) - NUM_REMARKS
    rest = f"<li>and {more} more</li>" if more > 0 else ""
    kind = {Severity.STOPS: "stops", Severity.HURTS: "hurts", Severity.NOTE: "note"}[finding.severity]
    return (
        f'<section class="finding {kind}"><b>{_safe(finding.severity.value)}</b> {_safe(finding.title)}'
        f'<ul>{rows}{rest}</ul><p class="cure dim">{_safe(finding.cure)}</p></section>'
    )


def _histogram(dataset: ImageSet) -> str:
    """A bar for each bucket, as long as the bucket has images with their repeats."""
    highest = max((bucket.count for bucket in dataset.buckets), default=1)
    bars = []
    for row, bucket in enumerate(dataset.buckets):
        top, length = 26 * row, round(380 * bucket.count / highest)
        size = f"{bucket.size[0]}x{bucket.size[1]}"
        bars.append(
            f'<text x="92" y="{top + 17}" text-anchor="end">{size}</text>'
            f'<rect x="102" y="{top + 4}" width="{max(length, 2)}" height="18" rx="2"/>'
            f'<text x="{length + 112}" y="{top + 17}">{bucket.count} from {counted(len(bucket.items), "image")}</text>'
        )
    height = 26 * len(dataset.buckets)
    return (
        f'<h3>Buckets</h3><svg class="chart" role="img" aria-label="Images in each bucket" width="640" '
        f'height="{height}" viewBox="0 0 640 {height}">{"".join(bars)}</svg>'
    )


def _tags(dataset: ImageSet) -> str:
    counts: Counter[str] = Counter()
    for tags in tag_frequency(dataset).values():
        counts.update(tags)
    rows = "".join(f"<li>{count} &times; {_safe(tag)}</li>" for tag, count in counts.most_common(NUM_TAGS))
    more = len(counts) - NUM_TAGS
    rest = f'<p class="dim">and {more} more</p>' if more > 0 else ""
    return f'<h3>Tags, by the number of images</h3><ul class="tags">{rows}</ul>{rest}' if rows else ""


def _sheet(bucket: Bucket, dataset: ImageSet, seen: Collection, seed: int, room: int) -> str:
    """Pictures of a bucket as they will be cropped, spread evenly over it."""
    count = min(room, len(bucket.items))
    chosen = [bucket.items[place * len(bucket.items) // count] for place in range(count)]
    figures = "".join(_figure(dataset.items[index], dataset, seen, f"{seed} {index}") for index in chosen)
    shown = f", {count} of them here" if count < len(bucket.items) else ""
    title = f"Bucket {bucket.size[0]}x{bucket.size[1]}: {counted(len(bucket.items), 'image')}{shown}"
    return f'<h3>{title}</h3><div class="sheet">{figures}</div>'


def _figure(item: ImageItem, dataset: ImageSet, seen: Collection, seed: str) -> str:
    subset = dataset.settings.subsets[item.subset]
    captions = "".join(
        f"<li>{_safe(text) or '<i>empty</i>'}</li>" for text in _captions(item, dataset, seen.total_steps, seed)
    )
    picture = _data_url(item, subset.resize_interpolation)
    return (
        f'<figure><img src="{picture}" alt=""><figcaption><b>{_safe(item.path.name)}</b> '
        f"{item.size[0]}x{item.size[1]}, {item.num_repeats}&times;<ol>{captions}</ol></figcaption></figure>"
    )


def _captions(item: ImageItem, dataset: ImageSet, total_steps: int, seed: str) -> list[str]:
    """Captions as they may come at the start, in the middle and at the end of the run."""
    settings = dataset.settings.subsets[item.subset].captions
    steps = [total_steps * part // max(NUM_CAPTIONS - 1, 1) for part in range(NUM_CAPTIONS)]
    return [
        render_caption(
            item.caption, settings, Random(f"{seed} {number}"), epoch=number, step=step, total_steps=total_steps
        )
        for number, step in enumerate(steps, 1)
    ]


def _data_url(item: ImageItem, interpolation: str | None) -> str:
    """The middle of the image as its bucket shows it, small, within the page."""
    picture = Image.fromarray(make_picture(Path(item.path), item.resized, item.bucket, interpolation))
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _safe(text: str) -> str:
    """Text that the page shows as it is; names that are not Unicode have their odd bytes marked."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))
