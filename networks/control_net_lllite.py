"""ControlNet-LLLite: small networks that let the U-Net of Stable Diffusion XL follow a picture.

Each stands before one projection of the attention on the way down and in the middle (queries, keys and values of the
pixels to each other, queries of the pixels to the text), looks at the picture and at what comes into the layer, and
adds to the latter: the layer itself stays as it is. Training and inference use the same modules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files.atomic import replacing
from library.files.weights import PICKLE_SUFFIXES, describe_keys, open_weights, save_safetensors
from networks.core.adapter import stand_in

PREFIX = "lllite_unet_"
LAYER = re.compile(
    r"(?:input_blocks\.(?P<number>\d+)|middle_block)\.\d+\.transformer_blocks\.\d+\.(?:attn1\.to_[qkv]|attn2\.to_q)"
)
"""Paths of the layers that are controlled."""
KERNELS: Mapping[int, tuple[int, ...]] = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
"""Depth of the picture's embedding -> width and stride of each of its convolutions."""
INPUT_BLOCKS_PER_LEVEL = 3
COND_EMB_DIM, NETWORK_DIM = 32, 64
"""What the published networks have."""


@dataclass
class Control:
    """What all modules of a network are told."""

    image: Tensor | None = None
    """[n, 3, H, W] in [-1, 1]"""
    multiplier: float = 1.0
    rows: Tensor | None = None
    """[B] one more factor for each sample of a batch."""
    enabled: bool = True


class LLLiteModule(nn.Module):
    """What is added to the input of one linear layer; its parts are named as in files."""

    stand_ins: ClassVar[tuple[type[nn.Module], type[nn.Module]]]

    def __init__(
        self, width: int, depth: int, cond_emb_dim: int, network_dim: int, dropout: float, control: Control
    ) -> None:
        super().__init__()
        self.control = control
        self.dropout = dropout
        self.stride = 1
        layers: list[nn.Module] = []
        channels = 3
        for number, kernel in enumerate(KERNELS[depth], start=1):
            wide = cond_emb_dim if number == len(KERNELS[depth]) else cond_emb_dim // 2
            layers += [nn.ReLU()] if layers else []
            layers.append(nn.Conv2d(channels, wide, kernel, stride=kernel))
            channels, self.stride = wide, self.stride * kernel
        self.conditioning1 = nn.Sequential(*layers)
        self.down = nn.Sequential(nn.Linear(width, network_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(network_dim + cond_emb_dim, network_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(network_dim, width))
        # At first the model is left exactly as it is, by the bias as well.
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)
        self._kept: Tensor | None = None

    def change(self, x: Tensor) -> Tensor | None:
        """What is to be added to `x` [B, h*w, C]; None for nothing.

        Raises:
            ValueError: the picture is of another size than what `x` is part of, or of another batch.
        """
        control = self.control
        if control.image is None or not control.enabled or control.multiplier == 0.0:
            return None
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self._weight.dtype)
        h = self.mid(torch.cat([self._tokens(x), self.down(x)], dim=-1))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        change: Tensor = self.up(h) * control.multiplier
        if control.rows is None:
            return change
        return change * _repeated(control.rows.to(change.device, change.dtype)[:, None, None], len(x))

    def embedding(self) -> Tensor:
        """[n, cond_emb_dim, h, w] of the picture; computed once for each picture where nothing is learnt."""
        weight = self._weight
        learns = torch.is_grad_enabled() and weight.requires_grad
        if learns or self._kept is None:
            image = self.control.image
            assert image is not None
            embedding: Tensor = self.conditioning1(_padded(image.to(weight.device, weight.dtype), self.stride))
            if learns:
                return embedding
            self._kept = embedding
        return self._kept

    def forget(self) -> None:
        """The picture, or a weight, is another one now."""
        self._kept = None

    def hold(self, base: Any) -> Mapping[str, Any]:
        """The attributes of the layer that stands in the place of `base`, besides those of `base` itself."""
        plain = "forward" not in base.__dict__ and type(base).forward is nn.Linear.forward
        return {"_base_forward": None if plain else base.forward}

    @property
    def _weight(self) -> Tensor:
        """One of its weights, which all lie in one place and in one dtype."""
        return self.down.get_parameter("0.weight")

    def _tokens(self, x: Tensor) -> Tensor:
        """[B, h*w, cond_emb_dim], one for each token of `x`, row by row."""
        tokens = self.embedding().flatten(2).transpose(1, 2)
        if tokens.shape[1] != x.shape[1]:
            assert self.control.image is not None
            height, width = self.control.image.shape[-2:]
            raise ValueError(
                f"the conditioning image is {width}x{height}, which is not the size of the picture that is made: "
                f"{tokens.shape[1]} places where the layer has {x.shape[1]}"
            )
        return _repeated(tokens, len(x))


class ControlledLinear(nn.Linear):
    """A linear layer whose input is changed; weight, bias and state-dict keys are those of the layer it stands for."""

    _held: tuple[LLLiteModule]
    _base_forward: Callable[[Tensor], Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        """[B, h*w, C] -> [B, h*w, O]"""
        change = self._held[0].change(input)
        if change is not None:
            input = input + change.to(input.dtype)
        return super().forward(input) if self._base_forward is None else self._base_forward(input)


LLLiteModule.stand_ins = (ControlledLinear, nn.Conv2d)


class ControlNetLLLite(nn.Module):
    """The modules of one network by the names that files have for them; `state_dict` is what a file holds.

    Attributes:
        cond_emb_dim: channels of the picture's embedding.
        network_dim: width of the modules inside.
    """

    def __init__(
        self,
        unet: nn.Module,
        cond_emb_dim: int = COND_EMB_DIM,
        network_dim: int = NETWORK_DIM,
        dropout: float | None = None,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if cond_emb_dim < 2:
            raise ValueError(f"--cond_emb_dim {cond_emb_dim}; expected 2 or more: the first convolution has half of it")
        self.cond_emb_dim, self.network_dim = cond_emb_dim, network_dim
        self.control = Control(multiplier=multiplier)
        self._places: list[tuple[nn.Module, str, LLLiteModule]] = []
        for path, match in _layers(unet):
            parent, _, attribute = path.rpartition(".")
            layer: Any = unet.get_submodule(path)
            with torch.device("cpu"):  # also when the model is on the meta device or still on its way to another
                sizes = (layer.in_features, _depth(match), cond_emb_dim, network_dim)
                module = LLLiteModule(*sizes, dropout or 0.0, self.control)
            self.add_module(PREFIX + path.replace(".", "_"), module)
            self._places.append((unet.get_submodule(parent), attribute, module))
        if not self._places:
            raise ValueError("ControlNet-LLLite is for the U-Net of Stable Diffusion XL, and this model has none")

    def apply_to(self) -> None:
        """Stand in the layers of the U-Net; one network may stand upon another."""
        for parent, attribute, module in self._places:
            stand_in(parent, attribute, module)

    def set_cond_image(self, image: Tensor | None) -> None:
        """Follow `image` [n, 3, H, W] in [-1, 1], 8 times as large as the latents; None leaves the model as it is.

        Latents that are n times a whole number of rows, such as those with and without the prompt, repeat it.
        """
        if image is not None and (image.dim() != 4 or image.shape[1] != 3):
            raise ValueError(f"a conditioning image of shape {list(image.shape)}; expected [n, 3, height, width]")
        self.control.image = image
        self._forget()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """How strongly the picture is followed: one number, or [B] for the samples of a batch."""
        if isinstance(multiplier, Tensor) and multiplier.dim():
            self.control.multiplier, self.control.rows = 1.0, multiplier
        else:
            self.control.multiplier, self.control.rows = float(multiplier), None

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the context lasts the model answers as if there were no network."""
        self.control.enabled = False
        try:
            yield
        finally:
            self.control.enabled = True

    def load_weights(self, file: str | os.PathLike[str]) -> None:
        """Read the weights of `file`, which has the sizes of this network.

        Raises:
            ValueError: it is no such file.
        """
        own = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        with open_weights(file) as weights:
            found = {key: weights.shape(key) for key in weights.keys()}
            if not any(key.startswith(PREFIX) for key in found):
                raise ValueError(f"{file} is no ControlNet-LLLite; it holds {describe_keys(found, 3)}")
            wrong = sorted(own.items() ^ found.items())
            if wrong:
                raise ValueError(
                    f"{file} does not fit this model: {describe_keys(dict(wrong), 3)} is missing or of another shape"
                )
            self.load_state_dict({key: weights.read(key) for key in own})
        self._forget()

    @staticmethod
    def write_weights(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
        """Write what `state_dict` gave; `.safetensors` with metadata, `.ckpt` and `.pt` without."""
        if file.suffix.lower() in PICKLE_SUFFIXES:
            with replacing(file) as temporary:
                torch.save(dict(tensors), temporary)
        else:
            save_safetensors(tensors, file, dict(metadata))

    def _forget(self) -> None:
        for _, _, module in self._places:
            module.forget()


def create_network(
    unet: nn.Module,
    file: str | os.PathLike[str] | None = None,
    cond_emb_dim: int | None = None,
    network_dim: int | None = None,
    dropout: float | None = None,
    multiplier: float = 1.0,
) -> ControlNetLLLite:
    """A network for `unet`, new or with the weights and sizes of `file`; it does not yet stand in the layers.

    Raises:
        ValueError: `file` is no ControlNet-LLLite for this model, or not of the sizes that are asked for.
    """
    if file is None:
        return ControlNetLLLite(unet, cond_emb_dim or COND_EMB_DIM, network_dim or NETWORK_DIM, dropout, multiplier)
    sizes = sizes_in_file(file)
    asked = {"cond_emb_dim": cond_emb_dim, "network_dim": network_dim}
    for (name, wanted), size in zip(asked.items(), sizes, strict=True):
        if wanted is not None and wanted != size:
            raise ValueError(f"{file} has --{name} {size}, not {wanted}; leave --{name} out, or start anew")
    network = ControlNetLLLite(unet, *sizes, dropout, multiplier)
    network.load_weights(file)
    return network


def sizes_in_file(file: str | os.PathLike[str]) -> tuple[int, int]:
    """The `cond_emb_dim` and `network_dim` of a file.

    Raises:
        ValueError: it is no ControlNet-LLLite.
    """
    with open_weights(file) as weights:
        keys = weights.keys()
        key = next((key for key in keys if key.startswith(PREFIX) and key.endswith(".mid.0.weight")), None)
        if key is None:
            raise ValueError(f"{file} is no ControlNet-LLLite; it holds {describe_keys(keys, 3)}")
        network_dim, both = weights.shape(key)
    return both - network_dim, network_dim


def _layers(unet: nn.Module) -> Iterator[tuple[str, re.Match[str]]]:
    """The controlled layers of `unet`, by their paths."""
    for path, module in unet.named_modules():
        match = LAYER.fullmatch(path)
        if match is not None and isinstance(module, nn.Linear):
            yield path, match


def _depth(match: re.Match[str]) -> int:
    """How far the picture is reduced for a layer: the middle is as small as the last input blocks."""
    number = match["number"]
    return max(KERNELS) if number is None else min(int(number) // INPUT_BLOCKS_PER_LEVEL + 1, max(KERNELS))


def _padded(image: Tensor, stride: int) -> Tensor:
    """`image` [n, 3, H, W] with its edges repeated up to multiples of `stride`, as maps of odd sides are halved."""
    height, width = image.shape[-2:]
    rest = (-width % stride, -height % stride)
    return F.pad(image, (0, rest[0], 0, rest[1]), mode="replicate") if any(rest) else image


def _repeated(values: Tensor, batch: int) -> Tensor:
    """`values` [n, ...] for a batch of a multiple of n samples."""
    if len(values) == batch:
        return values
    if batch % len(values):
        raise ValueError(f"{len(values)} conditioning images, or multipliers, for {batch} samples")
    return values.repeat(batch // len(values), *[1] * (values.dim() - 1))
