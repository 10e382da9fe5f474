"""The modelspec.* entries of a file's metadata (Stability AI Model Metadata Standard 1.0.1)."""

from __future__ import annotations

import base64
import logging
import mimetypes
import subprocess
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

VERSION = "1.0.1"

DESCRIBED = (
    "author",
    "description",
    "license",
    "tags",
    "usage_hint",
    "thumbnail",
    "merged_from",
    "trigger_phrase",
    "preprocessor",
    "is_negative_embedding",
)
"""Fields that are copied when the user gives them; `title` is one more."""


def build_model_spec(
    arch_spec: Mapping[str, str],
    described: Mapping[str, str | None],
    *,
    title: str | None = None,
    resolution: tuple[int, int] | None = None,
    timestep_range: tuple[int | None, int | None] = (None, None),
    clip_skip: int | None = None,
    time: datetime | None = None,
    adapter: str | None = "lora",
    commit: str | None = None,
) -> dict[str, str]:
    """The entries of one file, their names beginning with `modelspec.`.

    `arch_spec` holds architecture, implementation, resolution (as `512x512`, for a run that does not say) and, where
    the family has one, prediction_type. `described` holds `title` and the fields of `DESCRIBED`. `title` is the title
    of a file whose author gave none. `resolution` is width and height. `adapter` comes after the architecture's
    name, None for a whole model. `time` is that of the save, now unless given.
    """
    date = (time or datetime.now()).replace(microsecond=0).isoformat()
    kind = "Checkpoint" if adapter is None else "LoRA"
    fields: dict[str, str | None] = {
        "sai_model_spec": VERSION,
        "architecture": arch_spec["architecture"] + ("" if adapter is None else f"/{adapter}"),
        "implementation": arch_spec["implementation"],
        "implementation_version": f"sd-scripts/{commit or 'unknown'}",
        "title": described.get("title") or title or f"{kind}@{date}",
        "date": date,
        "resolution": arch_spec["resolution"] if resolution is None else "{}x{}".format(*resolution),
        "prediction_type": arch_spec.get("prediction_type"),
        "encoder_layer": None if clip_skip is None else str(clip_skip),
        "timestep_range": _timestep_range(*timestep_range),
    }
    fields.update({name: described.get(name) for name in DESCRIBED})
    fields["thumbnail"] = thumbnail_url(described.get("thumbnail"))
    return {f"modelspec.{name}": value for name, value in fields.items() if value is not None}


def thumbnail_url(thumbnail: str | None) -> str | None:
    """A data URL as it is; a picture's path as a data URL, or None with a warning when it cannot be read."""
    if not thumbnail or thumbnail.startswith("data:"):
        return thumbnail or None
    try:
        content = Path(thumbnail).read_bytes()
    except OSError as error:
        logger.warning("--metadata_thumbnail %s cannot be read and is left out: %s", thumbnail, error)
        return None
    kind = mimetypes.guess_type(thumbnail)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@cache
def commit_hash() -> str | None:
    """The git commit of this code, 40 hex digits; None outside a checkout or without git.

    git is asked once. A run asks before it has threads and workers: a worker that is forked in the moment in which
    another thread starts git keeps that thread waiting for as long as the worker lives.
    """
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _timestep_range(low: int | None, high: int | None) -> str | None:
    if low is None and high is None:
        return None
    return f"{0 if low is None else low},{1000 if high is None else high}"
