"""Copy a folder of images and add smaller ones, so that a training sees them at several sizes.

python tools/resize_images_to_resolution.py FROM TO --max_resolution 512x512,384x384 --copy_associated_files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.resizing import Resizing, areas_of, resize_folder
from library.flags.tool import at_least_one, run_tool

INTERPOLATIONS = ("area", "cubic", "lanczos4", "nearest", "linear", "box")


def main(words: Sequence[str] | None = None) -> int:
    """Write the images; 1 and one message if some cannot be read."""
    return run_tool(make_parser(), resize_images, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("src_img_folder", type=Path, help="folder of the images")
    parser.add_argument("dst_img_folder", type=Path, help="folder to write to; it is made if need be")
    parser.add_argument(
        "--max_resolution",
        default="512x512,384x384,256x256,128x128",
        help="sizes WxH (or W,H); an image gets the area of each, unless it is smaller (default: %(default)s)",
    )
    parser.add_argument(
        "--divisible_by", type=at_least_one, default=1, help="cut both sides to multiples of this (default: 1)"
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="how images are scaled (default: area)")
    parser.add_argument("--save_as_png", action="store_true", help="write .png, with alpha, in place of .jpg")
    parser.add_argument(
        "--copy_associated_files", action="store_true", help="copy captions and the like under the new names, too"
    )
    return parser


def resize_images(arguments: argparse.Namespace) -> None:
    """Write the images; raises ValueError as `resize_folder` does."""
    try:
        areas = areas_of(arguments.max_resolution)
    except ValueError as error:
        raise ValueError(f"--max_resolution: {error}") from None
    options = Resizing(
        areas,
        divisible_by=arguments.divisible_by,
        interpolation=arguments.interpolation or "area",
        suffix=".png" if arguments.save_as_png else ".jpg",
        copies_associated=arguments.copy_associated_files,
    )
    resize_folder(arguments.src_img_folder, arguments.dst_img_folder, options)


if __name__ == "__main__":
    sys.exit(main())
