"""What the dataset doctor says on the console."""

from __future__ import annotations

from library.data.dataset import ImageSet
from library.data.report import Collection, Finding, Remark, Severity, counted, effective_batch_size, num_uses

NUM_LISTED = 20
"""So many files stand under a finding; the rest are counted."""


def as_text(seen: Collection, findings: list[Finding]) -> str:
    """Findings under their severity, each with files and a cure, then the numbers of an epoch."""
    lines = []
    for severity in Severity:
        chosen = [finding for finding in findings if finding.severity is severity]
        if chosen:
            lines += [severity.value.upper(), *(line for finding in chosen for line in _finding_lines(finding)), ""]
    lines.append("ONE EPOCH")
    for number, dataset in enumerate(seen.datasets, 1):
        lines += _dataset_lines(number, dataset)
    num_held_out = sum(len(dataset.items) for dataset in seen.held_out)
    if num_held_out:
        lines.append(f"  {counted(num_held_out, 'image')} held out for validation")
    lines += [f"  {length_of_run(seen)}", "", verdict(findings)]
    return "\n".join(lines)


def length_of_run(seen: Collection) -> str:
    """Batches and steps of an epoch, and of the run where its epochs are known."""
    asked = seen.asked
    text = f"{counted(seen.num_batches, 'batch', 'batches')} and {counted(seen.steps_per_epoch, 'step')} an epoch"
    if asked.accumulation > 1:
        text += f" ({asked.accumulation} batches a step)"
    if asked.epochs is not None:
        text += f"; {counted(seen.total_steps, 'step')} in {counted(asked.epochs, 'epoch')}"
    return text


def verdict(findings: list[Finding]) -> str:
    """The last word, in one line."""
    counts = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    bad = [
        f"{counts[severity]} {word}"
        for severity, word in ((Severity.STOPS, "to mend before training"), (Severity.HURTS, "that will hurt"))
        if counts[severity]
    ]
    return "Found: " + ", ".join(bad) if bad else "Nothing here will hurt the training."


def shape_of(dataset: ImageSet) -> str:
    """Resolution, batch size and counts of one dataset."""
    width, height = dataset.settings.resolution
    return (
        f"{width}x{height}, batch size {dataset.settings.batch_size}: {counted(len(dataset.items), 'image')}, "
        f"{num_uses(dataset)} with repeats, {counted(dataset.num_batches, 'batch', 'batches')} of "
        f"{effective_batch_size(dataset):.2f} images on average"
    )


def _finding_lines(finding: Finding) -> list[str]:
    lines = [f"  {finding.title}"]
    lines += [f"    {line_of(remark)}" for remark in finding.remarks[:NUM_LISTED]]
    more = len(finding.remarks) - NUM_LISTED
    return [*lines, *([f"    and {more} more"] if more > 0 else []), f"    -> {finding.cure}"]


def line_of(remark: Remark) -> str:
    """A file and what there is to say of it."""
    return f"{remark.name}: {remark.text}" if remark.text else remark.name


def _dataset_lines(number: int, dataset: ImageSet) -> list[str]:
    lines = [f"  dataset {number}, {shape_of(dataset)}"]
    for index, subset in enumerate(dataset.settings.subsets):
        count = sum(item.subset == index for item in dataset.items)
        kind = ", regularisation" if subset.is_reg else ""
        lines.append(
            f"    {subset.source}: {counted(count, 'image')}, each {counted(subset.num_repeats, 'time')}{kind}"
        )
    for bucket in dataset.buckets:
        size = f"{bucket.size[0]}x{bucket.size[1]}"
        lines.append(f"    bucket {size:>9}: {counted(len(bucket.items), 'image')}, {bucket.count} with repeats")
    return lines
