"""Encode images into files beside them, and write into a metadata file at which size each is trained.

python tools/prepare_buckets_latents.py FOLDER metadata.json latents.json MODEL --max_resolution 512,512

For Stable Diffusion 1.x and 2.x. The training finds the files valid when its resolution and buckets are the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.flags.bucket_tool import make_parser
from library.flags.dataset import CacheFlags, DatasetFlags
from library.flags.model import ModelFlags
from library.flags.run import PrecisionFlags
from library.flags.settings import Settings
from library.flags.tool import run_tool

if __name__ == "__main__":
    # Above the heavy imports: --help and a wrong flag cost no import of torch.
    make_parser((__doc__ or "").splitlines()[0]).parse_args()

from library.models.sd.architecture import StableDiffusion
from library.train.bucket_latents import prepare_buckets

logger = logging.getLogger(__name__)

OFF = ("", "0", "false", "no")
"""Values of --alpha_mask that leave it off."""


def main(words: Sequence[str] | None = None) -> int:
    """Write latents and the file; 1 and one message if files do not fit."""
    return run_tool(make_parser((__doc__ or "").splitlines()[0]), prepare, words)


def prepare(arguments: argparse.Namespace) -> None:
    """Write latents and the file; raises ValueError or OSError as `prepare_buckets` does."""
    if arguments.max_data_loader_n_workers is not None:
        logger.warning("--max_data_loader_n_workers has no effect: images are always read ahead")
    settings = Settings.of(
        DatasetFlags(
            train_data_dir=str(arguments.train_data_dir),
            in_json=str(arguments.in_json),
            resolution=arguments.max_resolution,
            enable_bucket=True,
            min_bucket_reso=arguments.min_bucket_reso,
            max_bucket_reso=arguments.max_bucket_reso,
            bucket_reso_steps=arguments.bucket_reso_steps,
            bucket_no_upscale=arguments.bucket_no_upscale,
            flip_aug=arguments.flip_aug,
            alpha_mask=arguments.alpha_mask.lower() not in OFF,
        ),
        CacheFlags(
            cache_latents=True,
            cache_latents_to_disk=True,
            vae_batch_size=arguments.batch_size,
            skip_cache_check=arguments.skip_existing,
        ),
        ModelFlags(pretrained_model_name_or_path=arguments.model_name_or_path, v2=arguments.v2),
        PrecisionFlags(mixed_precision=arguments.mixed_precision),
    )
    prepare_buckets(
        settings,
        StableDiffusion(settings),
        arguments.in_json,
        arguments.out_json,
        full_path=arguments.full_path,
        recursive=arguments.recursive,
    )


if __name__ == "__main__":
    sys.exit(main())
