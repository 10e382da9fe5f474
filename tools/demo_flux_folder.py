"""Where does everything of the FLUX demo lie? Small FLUX.1 and Chroma models with their parts, pictures and prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers.models.t5.tokenization_t5 import T5Tokenizer

import demo_pictures
import demo_tokenizer
from demo_flux_weights import FluxSizes, small_autoencoder, small_clip, small_t5, small_transformer
from demo_folder import SMALL_DATASET, DemoData
from library.files.weights import save_safetensors

T5_FOLDER = "google_t5-v1_1-xxl"
"""The name under which FLUX.1 looks in --tokenizer_cache_dir."""
KINDS = ("dev", "schnell", "chroma")

PROMPTS = """\
# prompt, then: --w width, --h height, --s steps, --d seed, --g guidance of the model, --l scale, --n negative prompt
drawing, one orange circle, plain blue background --w 64 --h 64 --s 4 --d 1 --g 1
drawing, one white star, plain blue background --w 96 --h 64 --s 4 --d 2 --g 1 --l 2 --n red
"""


@dataclass(frozen=True)
class FluxDemo(DemoData):
    """The paths of the FLUX demo."""

    def transformer(self, kind: str = "dev") -> Path:
        """FLUX.1 "dev" or "schnell", or "chroma", a single .safetensors file."""
        return self.root / f"small_{kind}.safetensors"

    @property
    def clip_l(self) -> Path:
        """For --clip_l."""
        return self.root / "clip_l.safetensors"

    @property
    def t5xxl(self) -> Path:
        """For --t5xxl."""
        return self.root / "t5xxl.safetensors"

    @property
    def ae(self) -> Path:
        """For --ae."""
        return self.root / "ae.safetensors"


def write_flux_demo(root: Path) -> FluxDemo:
    """Write the whole folder; files that are there already become the same again."""
    demo = FluxDemo(root)
    demo_pictures.write_pictures(demo.pictures)
    words = demo_pictures.words()
    sizes = FluxSizes(
        clip_vocabulary=demo_tokenizer.write_tokenizer(demo.tokenizers / demo_tokenizer.FOLDER, words),
        t5_vocabulary=write_t5_tokenizer(demo.tokenizers / T5_FOLDER, words),
    )
    for kind in KINDS:
        save_safetensors(small_transformer(sizes, kind), demo.transformer(kind), {})
    save_safetensors(small_clip(sizes), demo.clip_l, {})
    save_safetensors(small_t5(sizes), demo.t5xxl, {})
    save_safetensors(small_autoencoder(sizes), demo.ae, {})
    demo.write_texts(SMALL_DATASET, PROMPTS)
    return demo


def write_t5_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write the files that `T5Tokenizer.from_pretrained(folder)` reads and return the size of the vocabulary.

    Each of `words` becomes one token; anything else is spelled in letters.
    """
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in words)]
    scores = [(piece, 0.0 if index < 3 else -10.0 + 0.1 * len(piece)) for index, piece in enumerate(pieces)]
    folder.mkdir(parents=True, exist_ok=True)
    T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512).save_pretrained(str(folder))
    return len(pieces)
