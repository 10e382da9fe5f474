"""Where does everything of the SDXL demo lie? A small Stable Diffusion XL model, tokenizers, pictures and prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import demo_pictures
import demo_tokenizer
from demo_folder import SMALL_DATASET, DemoData
from demo_sdxl_weights import SdxlSizes, small_sdxl_checkpoint
from library.files.weights import save_safetensors

BIGG_FOLDER = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"
"""The name under which Stable Diffusion XL looks in --tokenizer_cache_dir for its second tokenizer."""

PROMPTS = """\
# prompt, then: --w width, --h height, --s steps, --d seed, --l guidance, --n negative prompt
drawing, one orange circle, plain blue background --w 64 --h 64 --s 4 --d 1 --l 3
drawing, one white star, plain blue background --w 96 --h 64 --s 4 --d 2 --l 3 --n red
"""


@dataclass(frozen=True)
class SdxlDemo(DemoData):
    """The paths of the SDXL demo."""

    @property
    def checkpoint(self) -> Path:
        """The model, a single .safetensors file."""
        return self.root / "small_sdxl.safetensors"


def write_sdxl_demo(root: Path) -> SdxlDemo:
    """Write the whole folder; files that are there already become the same again."""
    demo = SdxlDemo(root)
    demo_pictures.write_pictures(demo.pictures)
    vocabulary = write_clip_tokenizers(demo.tokenizers, demo_pictures.words())
    save_safetensors(small_sdxl_checkpoint(SdxlSizes(vocabulary=vocabulary)), demo.checkpoint, {})
    demo.write_texts(SMALL_DATASET, PROMPTS)
    return demo


def write_clip_tokenizers(folder: Path, words: Iterable[str]) -> int:
    """Write both tokenizers into a folder for --tokenizer_cache_dir and return the size of their vocabulary.

    As published the second has the same words, and fills up with its first one.
    """
    words = list(words)
    demo_tokenizer.write_tokenizer(folder / BIGG_FOLDER, words, padding=demo_tokenizer.FIRST)
    return demo_tokenizer.write_tokenizer(folder / demo_tokenizer.FOLDER, words)
