"""FLUX.1 and Chroma on disk: finding out what a file is, and reading it into place.

A transformer is one file in the published layout, with or without `model.diffusion_model.` before its keys, the same in
several files, or a folder of diffusers. Its sizes are read off the shapes of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from library.files import hub
from library.files.shards import open_model
from library.files.sources import Source, fill_module
from library.files.views import with_scales
from library.files.weights import WEIGHT_SUFFIXES, WeightFile, describe_keys
from library.models.attention import AttentionMode
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.controlnet import FluxControlNet
from library.models.flux.layout import flux_shape, flux_sources
from library.models.flux.model import FluxShape, FluxTransformer, StreamTransformer
from library.models.flux.variants import Variant, variant_of
from library.models.kinds import PARTS, kind_of, kind_of_folder, without
from library.models.parts import part_folder

FAMILY = "flux"
LATENT_CHANNELS = 16
PATCH_CHANNELS = 4 * LATENT_CHANNELS

OnWeight = Callable[[str, Tensor], Tensor]


def locate(name: str, flag: str) -> Path:
    """The file or folder that `name` means; a hub id is fetched.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name; names it and `flag`.
    """
    return hub.locate(name, _hub_files, flag, WEIGHT_SUFFIXES)


def load_transformer(
    path: Path,
    model_type: str,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: AttentionMode = AttentionMode.SDPA,
    on_weight: OnWeight | None = None,
) -> StreamTransformer:
    """The transformer at `path`, frozen; `model_type` is what the user says it is.

    Raises:
        ValueError: the file is of another family, is not what `model_type` says, or does not hold all weights.
    """
    with transformer_sources(path) as sources:
        _check_type(variant_of(sources), model_type, path)
        model = transformer_without_weights(sources, path, attention)
        fill_module(model, sources, dtype, device, on_weight)
    return model.eval().requires_grad_(False)


@contextmanager
def transformer_sources(path: Path) -> Iterator[dict[str, Source]]:
    """The weights of the transformer at `path` under their published names, to be read while the context lasts.

    Raises:
        ValueError: it is of another family.
    """
    with _opened(path) as file:
        yield _checked_sources(file, path)


def transformer_without_weights(
    sources: Mapping[str, Source], path: Path, attention: AttentionMode = AttentionMode.SDPA
) -> StreamTransformer:
    """A model of the sizes that `sources` of the file at `path` have, on the meta device.

    Raises:
        ValueError: a weight that decides a size is missing, or the model takes other inputs than FLUX.1.
    """
    shape = flux_shape({name: source.shape for name, source in sources.items()}, path)
    _check_inputs(shape, path)
    with torch.device("meta"):
        return ChromaTransformer(shape, attention) if shape.guidance_depth else FluxTransformer(shape, attention)


def read_variant(path: Path, model_type: str) -> Variant:
    """Which model lies at `path`, by its keys alone.

    Raises:
        ValueError: it is of another family, or not what `model_type` says.
    """
    with transformer_sources(path) as sources:
        variant = variant_of(sources)
    _check_type(variant, model_type, path)
    return variant


def load_controlnet(
    path: Path, dtype: torch.dtype, device: torch.device | str, attention: AttentionMode = AttentionMode.SDPA
) -> FluxControlNet:
    """The ControlNet at `path`, frozen.

    Raises:
        ValueError: the file is something else, of another layout, or not whole.
    """
    with open_model(path) as opened:
        file = with_scales(opened)
        sources = flux_sources(file)
        if not any(name.startswith("controlnet_blocks.") for name in sources):
            raise ValueError(f"--controlnet_model_name_or_path: {path} is {_what(file)}, not a FLUX ControlNet")
        if "pos_embed_input.weight" not in sources:
            raise ValueError(
                f"--controlnet_model_name_or_path: {path} is a ControlNet of diffusers, which is another network: "
                "one with the keys input_hint_block and pos_embed_input is needed"
            )
        shape = flux_shape({name: source.shape for name, source in sources.items()}, path)
        with torch.device("meta"):
            model = FluxControlNet(shape, attention)
        fill_module(model, sources, dtype, device)
    return model.eval().requires_grad_(False)


def _hub_files(files: Sequence[str]) -> list[str]:
    """Of the files of a repository, those that are read: the transformer and the tokenizers."""
    wanted = ("transformer/", "tokenizer/", "tokenizer_2/", "model_index.json")
    return [name for name in files if name.startswith(wanted)]


@contextmanager
def _opened(path: Path) -> Iterator[WeightFile]:
    """The transformer's weights of the model at `path`."""
    place = part_folder(path, "transformer")
    other = kind_of_folder(path) if place == path else None
    if other is not None and FAMILY not in other.families:
        raise ValueError(f"{path} is {other.name}, not FLUX.1 or Chroma: {other.cure}")
    with open_model(place) as file:
        yield with_scales(file)


def _checked_sources(file: WeightFile, path: Path) -> dict[str, Source]:
    keys = file.keys()
    other = kind_of(keys, without([FAMILY]))
    if other is not None:
        raise ValueError(f"{path} is {other.name}, not FLUX.1 or Chroma: {other.cure}")
    sources = flux_sources(file)
    if not any(name.startswith("double_blocks.") for name in sources):
        raise ValueError(f"{path} is {_what(file)}, not a FLUX.1 or Chroma transformer")
    return sources


def _what(file: WeightFile) -> str:
    """What a file that is not wanted is, as far as its keys tell."""
    keys = file.keys()
    kind = kind_of(keys, [*without([]), *PARTS])
    return f"something with the keys {describe_keys(keys, 3)}" if kind is None else kind.name


def _check_type(variant: Variant, model_type: str, path: Path) -> None:
    if variant.model_type != model_type:
        raise ValueError(
            f"--model_type {model_type} is given, but {path} is {variant.title}: use --model_type {variant.model_type}"
        )


def _check_inputs(shape: FluxShape, path: Path) -> None:
    if shape.in_channels != PATCH_CHANNELS:
        raise ValueError(
            f"{path} takes {shape.in_channels} channels a patch where FLUX.1 takes {PATCH_CHANNELS}: it is made for "
            "filling in or for control pictures (Fill, Depth, Canny); train on FLUX.1 dev or schnell"
        )
