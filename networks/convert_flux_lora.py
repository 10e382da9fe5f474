"""Rewrite a LoRA for FLUX.1 or Chroma: the key names of sd-scripts <-> those of diffusers and ai-toolkit.

python networks/convert_flux_lora.py --src sd-scripts --dst diffusers --src_path mine.safetensors --dst_path theirs.safetensors
"""  # noqa: E501

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.flags.tool import run_tool
from networks.core.lora_file import ADAPTER_METADATA, HASHES, PAIR_ENDS, read_lora, write_lora
from networks.core.tool_values import safetensors_target
from networks.flux_layout import from_diffusers, is_diffusers_layout, to_diffusers

logger = logging.getLogger(__name__)

LAYOUTS = {"sd-scripts": "sd-scripts", "ai-toolkit": "diffusers", "diffusers": "diffusers"}
"""What a layout may be called -> what it is."""


def main(words: Sequence[str] | None = None) -> int:
    """Write the converted file; 1 and one message if the source does not fit."""
    return run_tool(make_parser(), convert, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    layouts = ", ".join(LAYOUTS)
    parser.add_argument("--src", default="ai-toolkit", help=f"layout of the source: {layouts} (default: ai-toolkit)")
    parser.add_argument("--dst", default="sd-scripts", help=f"layout to write: {layouts} (default: sd-scripts)")
    parser.add_argument("--src_path", help="LoRA to read")
    parser.add_argument("--dst_path", help=".safetensors file to write")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Write the converted file; raises ValueError if a flag or the source does not fit."""
    source, wanted = (_layout(getattr(arguments, flag), flag) for flag in ("src", "dst"))
    if source == wanted:
        raise ValueError(f"--src {arguments.src} and --dst {arguments.dst} are one layout; there is nothing to convert")
    if not arguments.src_path:
        raise ValueError("--src_path is missing: name the LoRA to read")
    target = safetensors_target(arguments.dst_path, "dst_path")
    file = read_lora(arguments.src_path)
    found = "diffusers" if is_diffusers_layout(file) else "sd-scripts"
    if found != source:
        raise ValueError(
            f"{file.path} is in the layout of {found}, such as {next(iter(file.pairs))}; give --src {found} and "
            "another --dst"
        )
    pairs = to_diffusers(file) if wanted == "diffusers" else from_diffusers(file)
    if not pairs:
        raise ValueError(f"{file.path}: nothing in it has a name in the layout {arguments.dst}")
    # What PEFT says of alpha and rank holds for the source only: the scale is in the matrices now.
    metadata = {key: value for key, value in file.metadata.items() if key != ADAPTER_METADATA}
    ends = PAIR_ENDS[1] if wanted == "diffusers" else PAIR_ENDS[0]
    write_lora(pairs, target, metadata, ends=ends, hashed=any(key in metadata for key in HASHES))
    logger.info("%s: %d adapters as %d in the layout of %s", target, len(file.pairs), len(pairs), arguments.dst)


def _layout(word: str, flag: str) -> str:
    if word in LAYOUTS:
        return LAYOUTS[word]
    near = difflib.get_close_matches(word, LAYOUTS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(LAYOUTS)}"
    raise ValueError(f"--{flag} {word} is not known; {hint}")


if __name__ == "__main__":
    sys.exit(main())
