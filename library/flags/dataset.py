"""Where images and captions come from, and how they become training pictures."""

from dataclasses import dataclass
from pathlib import Path

from library.flags.declare import flag


def width_and_height(text: str | None) -> tuple[int, int] | None:
    """`512` -> (512, 512) and `512,768` -> (width 512, height 768)."""
    if text is None:
        return None
    parts = text.replace(" ", "").split(",")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected one size in pixels, or width,height, got {text!r}")
    return int(parts[0]), int(parts[-1])


def least_and_most(text: str | None) -> tuple[float, float] | None:
    """`1.0,3.0` -> (1.0, 3.0)."""
    if text is None:
        return None
    try:
        least, most = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected two numbers min,max, such as 1.0,3.0, got {text!r}") from None
    if not 0 < least <= most:
        raise ValueError(f"expected 0 < min <= max, got {text!r}")
    return least, most


@dataclass(frozen=True)
class DatasetFlags:
    """Dataset"""

    train_data_dir: str | None = flag(
        None, "folder whose subfolders `<repeats>_<words>` hold the training images", names="folder"
    )
    cache_info: bool = flag(
        False, "remember captions and sizes in metadata_cache.json beside the images; what has changed is read again"
    )
    color_aug: bool = flag(False, "change hue or gamma a little, at random; not with cached latents")
    flip_aug: bool = flag(False, "mirror each image with probability one half")
    face_crop_aug_range: tuple[float, float] | None = flag(
        None,
        "crop around the face that the file name gives as _cx_cy_w_h, enlarged min,max times; not with enable_bucket",
        type=str,
        parse=least_and_most,
    )
    random_crop: bool = flag(False, "crop at a random place instead of the middle")
    debug_dataset: bool = flag(False, "list the batches of one epoch with their captions, and stop before training")
    resolution: tuple[int, int] | None = flag(
        None, "training size in pixels: one number, or width,height", type=str, parse=width_and_height
    )
    enable_bucket: bool = flag(False, "keep the shape of images: group them into buckets of equal width and height")
    min_bucket_reso: int = flag(256, "shortest bucket side in pixels", at_least=1)
    max_bucket_reso: int = flag(1024, "longest bucket side in pixels", at_least=1)
    bucket_reso_steps: int = flag(64, "bucket sides are multiples of this many pixels", at_least=1)
    bucket_no_upscale: bool = flag(False, "take the bucket from the image's own size and never enlarge an image")
    resize_interpolation: str | None = flag(
        None,
        "how images are scaled (area when shrinking and lanczos when enlarging, unless given)",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    alpha_mask: bool = flag(False, "weigh the loss by the alpha channel; images without one count in full")
    dataset_class: str | None = flag(
        None, "package.module.Class of your own that is called with these flags and gives the training set"
    )
    reg_data_dir: str | None = flag(
        None, "folder like train_data_dir with regularisation images (what the class looks like)", names="folder"
    )
    in_json: str | None = flag(
        None,
        ".json or .jsonl file with the captions, tags and sizes of the images in train_data_dir itself",
        names="file",
    )
    dataset_repeats: int = flag(1, "how often an epoch shows each image where the dataset does not say", at_least=1)
    train_batch_size: int = flag(1, "images per step and process", at_least=1)
    max_data_loader_n_workers: int = flag(8, "processes that read images; 0 reads in the main process", at_least=0)
    persistent_data_loader_workers: bool = flag(False, "keep those processes alive between epochs")
    conditioning_data_dir: str | None = flag(
        None, "folder with a second image (a mask with masked_loss) for each in train_data_dir itself", names="folder"
    )
    dataset_config: Path | None = flag(
        None, "TOML or JSON file that describes the datasets; it wins over the flags of this group", names="file"
    )
    allow_uncaptioned: bool = flag(False, "train on images without a caption instead of stopping")
    skip_corrupt: bool = flag(False, "leave out images that cannot be read instead of stopping")


@dataclass(frozen=True)
class CaptionFlags:
    """Captions"""

    shuffle_caption: bool = flag(False, "put the tags of a caption in random order")
    caption_separator: str = flag(",", "what stands between tags")
    caption_extension: str = flag(".caption", "ending of caption files; .txt is tried when no .caption exists")
    keep_tokens: int = flag(0, "this many leading tags stay in place and are never dropped", at_least=0)
    keep_tokens_separator: str = flag("", "mark in a caption: what stands before it stays in place")
    secondary_separator: str | None = flag(
        None, "joins tags that move and drop together; written as caption_separator in the end"
    )
    enable_wildcard: bool = flag(False, "read {a|b} as a choice and take one line of a caption with several")
    caption_prefix: str | None = flag(None, "text put before every caption")
    caption_suffix: str | None = flag(None, "text put after every caption")
    token_warmup_min: int = flag(1, "number of tags at the first step, when token_warmup_step is given", at_least=0)
    token_warmup_step: float = flag(
        0, "step from which all tags are used, or the part of the run when below 1; 0 is off", at_least=0
    )
    caption_dropout_rate: float = flag(0.0, "probability of an empty caption", at_least=0, at_most=1)
    caption_dropout_every_n_epochs: int = flag(0, "all captions are empty in every n-th epoch; 0 is off", at_least=0)
    caption_tag_dropout_rate: float = flag(0.0, "probability of dropping each tag", at_least=0, at_most=1)
    weighted_captions: bool = flag(False, "read (words:1.2) and [words] in captions as weights")


@dataclass(frozen=True)
class CacheFlags:
    """Caches"""

    cache_latents: bool = flag(False, "encode each image once before training and keep the result in memory")
    vae_batch_size: int = flag(1, "images per VAE call while filling the cache", at_least=1)
    cache_latents_to_disk: bool = flag(False, "keep encoded images beside the images as .npz, for later runs too")
    skip_cache_check: bool = flag(False, "trust cache files that are there without opening them")
    cache_dtype: str | None = flag(
        None,
        "number format of what is cached; unless given, float32 on disk and as the VAE gives it in memory",
        choices=(None, "float32", "float16", "bfloat16"),
    )


@dataclass(frozen=True)
class TextCacheFlags:
    """Caches of text"""

    cache_text_encoder_outputs: bool = flag(False, "encode each caption once and keep the result in memory")
    cache_text_encoder_outputs_to_disk: bool = flag(
        False, "keep encoded captions beside the images as .npz, for later runs too"
    )
    text_encoder_batch_size: int | None = flag(
        None, "captions per call of the text encoders while filling the cache; 16 unless given", at_least=1
    )
    text_cache_variants: int = flag(
        1, "variants kept of captions that change: shuffled, tags dropped, wildcards", at_least=1
    )
