"""Run by test_loader.py: worker processes after OpenCV's threads have run in this one. Argument: folder of images."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import load_training_set
from library.data.loader import BatchOrder, Loader


def main() -> int:
    """Print how many batches the workers made."""
    cv2.setNumThreads(4)
    cv2.warpAffine(np.zeros((2000, 2000, 3), np.uint8), np.eye(2, 3), (2000, 2000))
    folder = SubsetSettings(image_dir=Path(sys.argv[1]), class_tokens="x")
    data = load_training_set(DatasetConfig((DatasetSettings((64, 64), (folder,)),)))
    loader = Loader(BatchOrder(data, seed=1), workers=2)
    for epoch in (1, 2):
        sys.stdout.write(f"{len(list(loader.epoch(epoch, 0)))}\n")
        cv2.warpAffine(np.zeros((2000, 2000, 3), np.uint8), np.eye(2, 3), (2000, 2000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
