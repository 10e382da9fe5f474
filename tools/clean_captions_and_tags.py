"""Put the tags and captions of a metadata file in order.

python tools/clean_captions_and_tags.py metadata.json clean.json
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.caption_cleaning import clean_caption, clean_tags
from library.data.metadata_entries import clean_entries, missing, read_metadata, write_metadata
from library.flags.tool import run_tool

logger = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Write the file; 1 and one message if the metadata file is none."""
    given = list(sys.argv[1:] if words is None else words)
    places = [word for word in given if not word.startswith("-")]
    if len(places) == 3:  # in former times the folder of the images stood first
        given.remove(places[0])
    return run_tool(make_parser(), lambda arguments: clean(arguments, places[:-2]), given)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("in_json", type=Path, help="metadata file to read, .json or .jsonl")
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument("--debug", action="store_true", help="log every text before and after")
    return parser


def clean(arguments: argparse.Namespace, unused: Sequence[str] = ()) -> None:
    """Clean the texts; raises ValueError or OSError if a file cannot be read or written."""
    if unused:
        logger.warning("%s is not used: only the two metadata files are needed", unused[0])
    entries = read_metadata(arguments.in_json)
    for name in ("tags", "caption"):
        bare = missing(entries, name)
        if bare:
            logger.warning("%d of %d entries have no %s, such as %s", len(bare), len(entries), name, bare[0])
    write_metadata(arguments.out_json, clean_entries(entries, clean_tags, clean_caption))
    logger.info("%s: %d entries", arguments.out_json, len(entries))


if __name__ == "__main__":
    sys.exit(main())
