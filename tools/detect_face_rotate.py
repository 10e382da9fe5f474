"""Find drawn faces, turn and cut the images around them, and write where the face is into the file name.

python tools/detect_face_rotate.py --src_dir FROM --dst_dir TO --rotate --resize_fit --crop_size 512,768

Needs a face detector: pip install anime-face-detector
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from library.data.face_cutting import Cutting, DetectedFace, chosen_faces, cut_out, file_name, with_box
from library.data.picture_files import for_each, images_in, save_picture
from library.data.pixels import load_rgb
from library.flags.tool import at_least_one, run_tool, two_numbers

logger = logging.getLogger(__name__)

EYES = (slice(11, 17), slice(17, 23))
"""The points of the left and of the right eye among the 28 that the detector gives for a face."""

Detect = Callable[[np.ndarray], list[DetectedFace]]
"""[H, W, 3] uint8 RGB -> the faces in it."""


def main(words: Sequence[str] | None = None) -> int:
    """Write the pictures; 1 and one message if images or the detector are missing."""
    return run_tool(make_parser(), cut_faces, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--src_dir", help="folder of the images")
    parser.add_argument("--dst_dir", help="folder to write to; it is made if need be")
    parser.add_argument("--rotate", action="store_true", help="turn the image so that the eyes are level")
    parser.add_argument(
        "--resize_fit", action="store_true", help="shrink until the shorter side fits --crop_size, before it is cut"
    )
    parser.add_argument("--resize_face_size", type=at_least_one, help="scale the image so that the face is this large")
    parser.add_argument("--crop_size", type=two_numbers, help="keep WIDTH,HEIGHT pixels around the face")
    parser.add_argument("--crop_ratio", type=_ratios, help="keep this many widths,heights of the face, such as 4,5")
    parser.add_argument("--min_size", type=at_least_one, help="leave out faces with fewer pixels on the longer side")
    parser.add_argument("--max_size", type=at_least_one, help="leave out faces with more pixels on the longer side")
    parser.add_argument("--multiple_faces", action="store_true", help="write a picture for every face, not one")
    parser.add_argument("--debug", action="store_true", help="draw a frame around the face")
    return parser


def cut_faces(arguments: argparse.Namespace) -> None:
    """Write a picture for each image with a face; raises ValueError for what is missing or cannot be read."""
    for name in ("src_dir", "dst_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing; expected a folder")
    if arguments.resize_fit and arguments.crop_size is None:
        raise ValueError("--resize_fit needs --crop_size, the size to fit")
    images = images_in(Path(arguments.src_dir))
    detect = load_detector()
    written, faceless = [0], [0]

    def cut(path: Path) -> None:
        count = _cut_image(path, detect, arguments)
        written[0] += count
        faceless[0] += count == 0

    for_each(images, cut)
    logger.info(
        "%s: %d pictures; %d of %d images show no face", arguments.dst_dir, written[0], faceless[0], len(images)
    )


def load_detector() -> Detect:
    """The detector; its weights are fetched on first use. ValueError says what to install."""
    try:
        import anime_face_detector
    except ImportError as error:
        raise ValueError(f"no face detector is installed ({error}); pip install anime-face-detector") from None
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    detector = anime_face_detector.create_detector("yolov3", device=device)
    return lambda image: [_as_face(found) for found in detector(np.ascontiguousarray(image[:, :, ::-1]))]


def _as_face(found: dict[str, Any]) -> DetectedFace:
    """A face as the detector gives it: `bbox` left, top, right, bottom, score; `keypoints` [28, 3] x, y, score."""
    left, top, right, bottom, score = (float(value) for value in found["bbox"])
    eyes = [np.asarray(found["keypoints"])[points, :2].mean(axis=0) for points in EYES]
    (left_x, left_y), (right_x, right_y) = ((float(x), float(y)) for x, y in eyes)
    centre, size = ((left + right) / 2, (top + bottom) / 2), (right - left, bottom - top)
    return DetectedFace(centre, size, (left_x, left_y), (right_x, right_y), score)


def _cut_image(path: Path, detect: Detect, arguments: argparse.Namespace) -> int:
    """The pictures of one image; how many there are."""
    image = load_rgb(path)
    faces = chosen_faces(detect(image), arguments.min_size, arguments.max_size, all_of_them=arguments.multiple_faces)
    if not faces:
        logger.warning("%s: no face is found", path.name)
    cutting = Cutting(
        rotate=arguments.rotate,
        resize_face_size=arguments.resize_face_size,
        crop_ratio=arguments.crop_ratio,
        resize_fit=arguments.resize_fit,
        crop_size=arguments.crop_size,
    )
    for number, found in enumerate(faces, 1):
        picture, face = cut_out(image, found, cutting)
        name = file_name(path.stem, number if arguments.multiple_faces else None, face)
        save_picture(with_box(picture, face) if arguments.debug else picture, Path(arguments.dst_dir) / name)
    return len(faces)


def _ratios(text: str) -> tuple[float, float]:
    try:
        across, down = (float(part) for part in text.split(","))
    except ValueError:
        across = down = 0.0
    if across < 1 or down < 1:
        raise argparse.ArgumentTypeError(f"expected two numbers of at least 1 such as 4,5, got {text!r}")
    return across, down


if __name__ == "__main__":
    sys.exit(main())
