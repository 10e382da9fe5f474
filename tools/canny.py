"""Draw the edges of an image in white on black, as ControlNets for canny expect them.

python tools/canny.py --input photo.jpg --output edges.png
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2

from library.data.picture_files import for_each, images_in, save_picture
from library.data.pixels import load_rgb
from library.flags.tool import run_tool

logger = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Write the edges; 1 and one message if the image cannot be read."""
    return run_tool(make_parser(), draw_edges, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", help="an image, or a folder of images")
    parser.add_argument("--output", help="image to write; for a folder, the folder of the .png files")
    parser.add_argument("--thres1", type=int, default=32, help="weaker edges are left out (default: 32)")
    parser.add_argument("--thres2", type=int, default=224, help="edges this strong are always drawn (default: 224)")
    return parser


def draw_edges(arguments: argparse.Namespace) -> None:
    """Write the edges; raises ValueError if an image cannot be read or a flag is missing."""
    for name in ("input", "output"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing; expected an image or a folder")
    source, target = Path(arguments.input), Path(arguments.output)
    images = images_in(source) if source.is_dir() else [source]

    def draw(path: Path) -> None:
        picture = cv2.Canny(load_rgb(path), arguments.thres1, arguments.thres2)
        save_picture(picture, target / f"{path.stem}.png" if source.is_dir() else target)

    for_each(images, draw)
    logger.info("%s: %d images", target, len(images))


if __name__ == "__main__":
    sys.exit(main())
