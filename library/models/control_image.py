"""The picture that a ControlNet follows, and how it is shown to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

CONTROL_IMAGE = "controlnet_image"
"""Among the extras of a request for a picture: the file of the picture to follow (--cn)."""


def read_control(path: Path, height: int, width: int) -> Tensor:
    """The image at `path`, scaled to `height` x `width` whatever its shape: [1, 3, H, W] in [-1, 1], float32.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path} for the ControlNet to follow") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image that the ControlNet could follow: {error}") from error
    values = torch.from_numpy(np.asarray(scaled).copy())
    return (values.permute(2, 0, 1)[None].float() / 127.5) - 1
