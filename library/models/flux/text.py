"""What FLUX.1 and Chroma take from their text encoders, and reading these from their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files.shards import open_model
from library.files.sources import Source
from library.files.views import part_of, with_scales
from library.files.weight_id import weight_id
from library.files.weights import WeightFile
from library.models.kinds import MODELS, kind_of
from library.models.parts import part_folder
from library.models.text.clip import TextEncoder, build_text_encoder, clip_sources
from library.models.text.t5 import T5Encoder, build_t5, t5_sources

CLIP_TOKENS = 77
_CLIP_PREFIX, _T5_PREFIX = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
"""Where they lie in a file that holds the whole model."""
_CLIP_FOLDER, _T5_FOLDER = "text_encoder", "text_encoder_2"
"""Where they lie in a folder of diffusers."""
_CLIP_UNUSED = ("text_projection.weight", "logit_scale")


class NoTextEncoder(nn.Module):
    """Stands where FLUX.1 has CLIP-L in a model that has none: every pooled state is zero."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> zeros [B, 77, 1], the shape that caches of such models have."""
        return torch.zeros(*input_ids.shape, 1, device=input_ids.device)


def load_clip(path: Path, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """CLIP-L at `path`, a file or a folder, frozen.

    Raises:
        ValueError: the file holds another model, or not all weights.
    """
    with _opened(path, _CLIP_FOLDER, _CLIP_PREFIX) as file:
        return build_text_encoder(_clip_sources(file, path), "quick_gelu", dtype, device)


def load_t5(path: Path, dtype: torch.dtype, device: torch.device | str) -> T5Encoder:
    """T5-XXL at `path`, a file or a folder, frozen; a file in float8 becomes `dtype` like any other.

    Raises:
        ValueError: the file holds another model, or not all weights.
    """
    with _opened(path, _T5_FOLDER, _T5_PREFIX) as file:
        return build_t5(_t5_sources(file, path), dtype, device)


def clip_id(path: Path) -> str:
    """What names the weights of CLIP-L at `path`."""
    with _opened(path, _CLIP_FOLDER, _CLIP_PREFIX) as file:
        return weight_id(_clip_sources(file, path))


def t5_id(path: Path) -> str:
    """What names the weights of T5 at `path`; in float8 they are others than in float16."""
    with open_model(part_folder(path, _T5_FOLDER)) as opened:
        whole = part_of(opened, _T5_PREFIX)
        in_float8 = any(whole.dtype(key).itemsize == 1 for key in whole.keys())
        return weight_id(_t5_sources(with_scales(whole), path)) + ("-fp8" if in_float8 else "")


def pooled_state(states: Tensor, input_ids: Tensor) -> Tensor:
    """[B, 77, D] -> [B, D]: the state at the first end mark, which is the largest token."""
    place = input_ids.argmax(dim=-1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, place).squeeze(1)


@contextmanager
def _opened(path: Path, folder: str, prefix: str) -> Iterator[WeightFile]:
    """The file at `path`, or in its `folder`, or the part of it under `prefix` if there is one."""
    with open_model(part_folder(path, folder)) as file:
        yield with_scales(part_of(file, prefix))


def _clip_sources(file: WeightFile, path: Path) -> dict[str, Source]:
    keys = file.keys()
    if kind_of(keys, MODELS) is not None or not any("token_embedding." in key for key in keys):
        raise ValueError(f"--clip_l: {path} is {_what(file)}, not the text encoder CLIP-L")
    return {name: source for name, source in clip_sources(file).items() if name not in _CLIP_UNUSED}


def _t5_sources(file: WeightFile, path: Path) -> dict[str, Source]:
    if not any(key.startswith("encoder.block.") for key in file.keys()):
        raise ValueError(f"--t5xxl: {path} is {_what(file)}, not the text encoder T5-XXL")
    return t5_sources(file)


def _what(file: WeightFile) -> str:
    kind = kind_of(file.keys())
    return "something unknown" if kind is None else kind.name
