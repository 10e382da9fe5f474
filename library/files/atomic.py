"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end of the block.

    The bytes reach the disk before the name changes, so a crash or a full disk leaves the old file untouched.
    An exception in the block removes the temporary file. The temporary name keeps the extension of `path`,
    since some writers append their own when it is missing.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    try:
        yield temporary
        # Windows flushes only handles that are open for writing.
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
