"""Collect the tags beside images in a metadata file.

python tools/merge_dd_tags_to_metadata.py FOLDER metadata.json --in_json metadata.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.metadata_entries import merge_texts
from library.flags.merge_texts import merge_parser
from library.flags.tool import run_tool


def main(words: Sequence[str] | None = None) -> int:
    """Write the file; 1 and one message if the user's files do not fit."""
    return run_tool(make_parser(), merge, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    return merge_parser((__doc__ or "").splitlines()[0], "tags", ".txt")


def merge(arguments: argparse.Namespace) -> None:
    """Merge the tags; raises ValueError or OSError as `merge_texts` does."""
    merge_texts(
        arguments.train_data_dir,
        arguments.out_json,
        arguments.in_json,
        name="tags",
        extension=arguments.caption_extension,
        full_path=arguments.full_path,
        recursive=arguments.recursive,
    )


if __name__ == "__main__":
    sys.exit(main())
