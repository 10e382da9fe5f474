"""The flags of the tool that encodes the images of a metadata file."""

import argparse
from pathlib import Path

from library.flags.tool import at_least_one, two_numbers


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("train_data_dir", type=Path, help="folder of the images")
    parser.add_argument("in_json", type=Path, help="metadata file to read, .json or .jsonl")
    parser.add_argument("out_json", type=Path, help="metadata file to write, with train_resolution for each image")
    parser.add_argument("model_name_or_path", help="model or VAE: a file, a folder of diffusers, or a hub id")
    parser.add_argument("--v2", action="store_true", help="no effect: the VAE of 2.x is that of 1.x")
    parser.add_argument("--batch_size", type=at_least_one, default=1, help="images per call of the VAE (default: 1)")
    parser.add_argument("--max_data_loader_n_workers", type=int, help="no effect: images are always read ahead")
    parser.add_argument(
        "--max_resolution", type=two_numbers, default="512,512", help="area of the pictures, W,H (default: 512,512)"
    )
    parser.add_argument("--min_bucket_reso", type=at_least_one, default=256, help="shortest side (default: 256)")
    parser.add_argument("--max_bucket_reso", type=at_least_one, default=1024, help="longest side (default: 1024)")
    parser.add_argument(
        "--bucket_reso_steps", type=at_least_one, default=64, help="sides are multiples of this (default: 64)"
    )
    parser.add_argument("--bucket_no_upscale", action="store_true", help="images are never enlarged")
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="numbers of the VAE (default: no)"
    )
    parser.add_argument("--full_path", action="store_true", help="keys are paths of images as found, not their stems")
    parser.add_argument("--flip_aug", action="store_true", help="encode mirror images, too")
    parser.add_argument("--alpha_mask", default="", help="anything but 0, false or no: keep the alpha channel as mask")
    parser.add_argument("--skip_existing", action="store_true", help="do not look into the files that are there")
    parser.add_argument("--recursive", action="store_true", help="look into folders inside, too; needs --full_path")
    return parser
