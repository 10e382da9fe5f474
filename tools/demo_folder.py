"""Where does everything of the demo lie? A small model, its tokenizer, pictures, a dataset file and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import demo_pictures
import demo_tokenizer
from demo_checkpoint import Sizes, small_checkpoint
from library.files.weights import save_safetensors

DATASET = """\
[general]
caption_extension = ".txt"
shuffle_caption = true      # a new order of the comma-separated tags each time a picture is shown
keep_tokens = 1             # the first tag stays in front

[[datasets]]
resolution = 192            # pixels: as much area as 192 x 192, in the shape of the picture
batch_size = 2
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 512
bucket_reso_steps = 64

  [[datasets.subsets]]
  image_dir = "{pictures}"
  num_repeats = 2
"""

SMALL_DATASET = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64             # pixels: as much area as 64 x 64, in the shape of the picture
batch_size = 4
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32

  [[datasets.subsets]]
  image_dir = "{pictures}"
  num_repeats = 1
"""
"""For families whose small model is made for pictures of this size."""

PROMPTS = """\
# prompt, then: --w width, --h height, --s steps, --d seed, --l guidance, --n negative prompt
drawing, one orange circle, plain blue background --w 192 --h 192 --s 12 --d 1 --l 3
drawing, one white star, plain blue background --w 256 --h 128 --s 12 --d 2 --l 3
"""


@dataclass(frozen=True)
class DemoData:
    """What a demo of any family has in its folder besides the model."""

    root: Path

    @property
    def tokenizers(self) -> Path:
        """For --tokenizer_cache_dir."""
        return self.root / "tokenizers"

    @property
    def pictures(self) -> Path:
        """Pictures and captions."""
        return self.root / "pictures"

    @property
    def dataset(self) -> Path:
        """For --dataset_config."""
        return self.root / "dataset.toml"

    @property
    def prompts(self) -> Path:
        """For --sample_prompts."""
        return self.root / "prompts.txt"

    def write_texts(self, dataset: str, prompts: str) -> None:
        """Write the dataset file, with the folder of the pictures in place of {pictures}, and the prompts."""
        self.dataset.write_text(dataset.format(pictures=self.pictures.resolve().as_posix()), encoding="utf-8")
        self.prompts.write_text(prompts, encoding="utf-8")


@dataclass(frozen=True)
class DemoFolder(DemoData):
    """The paths of a demo folder of Stable Diffusion 1.x."""

    @property
    def checkpoint(self) -> Path:
        """The model, a single .safetensors file."""
        return self.root / "small_sd15.safetensors"


def write_demo(root: Path) -> DemoFolder:
    """Write the whole folder; files that are there already become the same again."""
    demo = DemoFolder(root)
    demo_pictures.write_pictures(demo.pictures)
    vocabulary = demo_tokenizer.write_tokenizer(demo.tokenizers / demo_tokenizer.FOLDER, demo_pictures.words())
    save_safetensors(small_checkpoint(Sizes(vocabulary=vocabulary)), demo.checkpoint, {})
    demo.write_texts(DATASET, PROMPTS)
    return demo
