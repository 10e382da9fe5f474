"""A file of weights seen otherwise: only a part of it, or float8 weights multiplied by the scales beside them.

ComfyUI writes whole models as one file (`model.diffusion_model.`, `text_encoders.t5xxl.transformer.`, `vae.`), and
float8 weights with a scale for each tensor or each row (`scale_weight`, in newer files `weight_scale`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.files.weights import WeightFile

_SCALES = (".scale_weight", ".weight_scale")
_UNREAD = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""What such files hold for calculating in float8: it does not change the weights."""


def part_of(file: WeightFile, prefix: str) -> WeightFile:
    """The tensors of `file` whose keys begin with `prefix`, without it; `file` itself if there are none."""
    return _Part(file, prefix) if any(key.startswith(prefix) for key in file.keys()) else file


def with_scales(file: WeightFile) -> WeightFile:
    """`file` with scaled float8 weights multiplied out, in float32; `file` itself if it has no scales.

    Raises:
        ValueError: a scale is of another kind than one for the tensor or one for each row, or has no weight.
    """
    return _Scaled(file) if any(key.endswith(_SCALES) for key in file.keys()) else file


class _View(WeightFile):
    """Another look at an open file, which stays open and belongs to whoever opened it."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.path = file.path
        self.metadata = file.metadata

    def keys(self) -> list[str]:
        return self.file.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.file.dtype(key)

    def read(self, key: str) -> Tensor:
        return self.file.read(key)

    def close(self) -> None:
        self.file.close()


class _Part(_View):
    def __init__(self, file: WeightFile, prefix: str) -> None:
        super().__init__(file)
        self.prefix = prefix

    def keys(self) -> list[str]:
        return [key.removeprefix(self.prefix) for key in self.file.keys() if key.startswith(self.prefix)]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(self.prefix + key)

    def dtype(self, key: str) -> torch.dtype:
        return self.file.dtype(self.prefix + key)

    def read(self, key: str) -> Tensor:
        return self.file.read(self.prefix + key)


class _Scaled(_View):
    def __init__(self, file: WeightFile) -> None:
        super().__init__(file)
        self.scales: dict[str, str] = {}
        present = set(file.keys())
        for key in present:
            end = next((end for end in _SCALES if key.endswith(end)), None)
            if end is None:
                continue
            weight = key.removesuffix(end) + ".weight"
            if weight not in present:
                raise ValueError(f"{file.path}: {key} is there, but the weight that it scales is not")
            self.scales[weight] = key
            rows, values = file.shape(weight)[0], file.shape(key)
            if values not in ((), (1,), (rows,), (rows, 1)):
                raise ValueError(
                    f"{file.path}: {key} has shape {list(values)}: only float8 weights with one scale for each tensor "
                    "or row are read; give the bf16 or plain float8 file"
                )

    def keys(self) -> list[str]:
        return [key for key in self.file.keys() if not key.endswith((*_SCALES, *_UNREAD))]

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key in self.scales else self.file.dtype(key)

    def read(self, key: str) -> Tensor:
        value = self.file.read(key)
        if key not in self.scales:
            return value
        scale = self.file.read(self.scales[key]).float()
        return value.float().mul_(scale.reshape(-1, *[1] * (value.dim() - 1)))
