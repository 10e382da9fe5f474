"""Rewrite a FLUX.1 or Chroma transformer in the layout of diffusers as one file with the published keys.

python tools/convert_diffusers_to_flux.py --diffusers_path FLUX.1-dev --save_to flux1-dev.safetensors

Training reads the layout of diffusers too; other programs want the single file. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from library.files.sources import check_sources
from library.files.streaming import stream_safetensors
from library.flags.tool import run_tool
from library.models.flux.checkpoint import transformer_sources, transformer_without_weights
from library.models.flux.layout import is_of_diffusers
from library.models.flux.variants import variant_of
from networks.core.tool_values import dtype_of, safetensors_target

logger = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Write the single file; 1 and one message if the source does not fit."""
    return run_tool(make_parser(), convert, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--diffusers_path",
        required=True,
        help="folder of the pipeline or of its transformer, its file, or any one of its several files",
    )
    parser.add_argument("--save_to", required=True, help=".safetensors file to write")
    parser.add_argument(
        "--mem_eff_load_save", action="store_true", help="no effect: one tensor is in memory at a time anyway"
    )
    parser.add_argument(
        "--save_precision", help="number format to write: fp32, fp16, bf16 or fp8 (default: that of each weight)"
    )
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Write the single file; raises ValueError if a flag or the source does not fit."""
    path, target = Path(arguments.diffusers_path), safetensors_target(arguments.save_to, "save_to")
    if not path.exists():
        raise ValueError(f"--diffusers_path: {path}: no such file or folder")
    asked = dtype_of(arguments.save_precision, "save_precision", stored=True) if arguments.save_precision else None
    with transformer_sources(path) as sources:
        first = next(iter(sources.values())).file
        if not is_of_diffusers(first):
            raise ValueError(f"--diffusers_path: {first.path} has the published keys already; there is nothing to do")
        model = transformer_without_weights(sources, path)
        check_sources(model.state_dict(), sources)
        shapes = {
            name: torch.empty(source.shape, dtype=asked or source.file.dtype(source.key), device="meta")
            for name, source in sources.items()
        }
        stream_safetensors(shapes, lambda name: sources[name].read().to(shapes[name].dtype), target)
        logger.info("%s: %s, %d weights", target, variant_of(sources).title, len(shapes))


if __name__ == "__main__":
    sys.exit(main())
