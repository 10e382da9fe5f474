"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp(\.[^.]+)?")
"""What `replacing`, `replacing_folder` and `remove` call what has no name yet, or any more."""
LEFTOVER_AGE = 3600
"""Seconds after which nobody can be at work on a temporary file any more."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end of the block.

    The bytes reach the disk before the name changes, so a crash or a full disk leaves the old file untouched.
    An exception in the block removes the temporary file. The temporary name keeps the extension of `path`,
    since some writers append their own when it is missing.

    Raises:
        OSError: the system refused, in whatever words the writer says so.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        with _errors_of_the_system():
            yield temporary
        # Some writers (safetensors) make files that only their owner may read; the user's umask decides here.
        temporary.chmod(mode)
        # Windows flushes only handles that are open for writing.
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; it takes the place of `path` at the end of the block.

    As with `replacing`, every byte is on the disk before the name changes, and an exception removes the folder. A
    folder that `path` names already is moved aside first, for the moment that lies between two renames.
    """
    target = Path(path)
    unique = uuid.uuid4().hex[:12]
    temporary, aside = (target.with_name(f".{target.name}.{unique}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        with _errors_of_the_system():
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
        if target.exists():
            os.replace(target, aside)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or a whole folder; a folder loses its name first, so that half of one is never taken for all."""
    if not path.is_dir():
        path.unlink()
        return
    nameless = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    os.replace(path, nameless)
    shutil.rmtree(nameless)


@contextmanager
def _errors_of_the_system() -> Iterator[None]:
    """Turn what safetensors and torch raise when the system does not write, such as on a full disk, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = str(error)
        if number := re.search(r"\(os error (\d+)\)", text):  # safetensors
            raise _os_error(int(number[1])) from error
        if reason := re.search(r"write\(\): fd \d+ failed with (.+)", text):  # torch, former format
            known = [code for code in errno.errorcode if os.strerror(code) == reason[1].strip()]
            raise _os_error(known[0] if known else errno.EIO) from error
        if "inline_container" in text or "PytorchStreamWriter" in text:  # torch, which keeps the reason to itself
            raise OSError(errno.EIO, "writing stopped in the middle; the disk is full or gone") from error
        raise


def _os_error(number: int) -> OSError:
    if os.name == "nt":  # numbers of Windows, which Python translates
        return OSError(0, f"error {number} of Windows", None, number)
    return OSError(number, os.strerror(number))


def remove_leftovers(folders: Iterable[Path], suffix: str = "") -> None:
    """Remove what runs that were killed left of files and folders ending in `suffix`.

    What is not old stays, since someone may be writing it now.
    """
    long_ago = time.time() - LEFTOVER_AGE
    extension = Path(suffix).suffix
    for folder in folders:
        with os.scandir(folder) as entries:
            found = [e for e in entries if e.name.endswith(extension) and LEFTOVER.fullmatch(e.name)]
        for entry in found:
            if entry.stat().st_mtime >= long_ago:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)
