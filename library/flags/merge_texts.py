"""The flags of the tools that collect texts beside images in a metadata file."""

import argparse
from pathlib import Path


def merge_parser(description: str, what: str, extension: str) -> argparse.ArgumentParser:
    """A parser for a tool that collects `what` from text files which end in `extension`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("train_data_dir", type=Path, help="folder of the images and their text files")
    parser.add_argument("out_json", type=Path, help="metadata file to write, .json or .jsonl")
    parser.add_argument("--in_json", type=Path, help="metadata file to add to (default: out_json, if it is there)")
    parser.add_argument(
        "--caption_extension", default=extension, help=f"ending of the files that hold {what} (default: %(default)s)"
    )
    parser.add_argument("--full_path", action="store_true", help="keys are paths of images as found, not their stems")
    parser.add_argument("--recursive", action="store_true", help="look into folders inside, too; needs --full_path")
    parser.add_argument("--debug", action="store_true", help="log every text")
    return parser
