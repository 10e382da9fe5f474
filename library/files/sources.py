"""Where the weights of a module lie in files, and reading them into their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.files.weights import WeightFile, describe_keys


@dataclass(frozen=True)
class Source:
    """Where the value of one parameter comes from: a tensor of a file, some of its rows, or several one after other."""

    file: WeightFile
    key: str
    rows: slice | None = None
    more: tuple[Source, ...] = ()
    """What follows it along the first dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `read` will have."""
        whole = self.file.shape(self.key)
        if self.rows is None and not self.more:
            return whole
        own = whole[0] if self.rows is None else len(range(*self.rows.indices(whole[0])))
        return (own + sum(part.shape[0] for part in self.more), *whole[1:])

    def read(self) -> Tensor:
        """The value on the CPU, as stored."""
        value = self.file.read(self.key)
        if self.rows is not None:
            value = value[self.rows].clone()
        return torch.cat([value, *(part.read() for part in self.more)]) if self.more else value


def fill_module(
    module: nn.Module,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    device: torch.device | str,
    on_weight: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give a module built on the meta device its weights, key by key, so that one tensor is in the air at a time.

    `sources` name every parameter and persistent buffer of `module`. Floating tensors are cast to `dtype`, integers
    keep theirs; `on_weight` sees each name and value as stored and answers with what takes its place: what is in float8
    stays so. The weight of a 1x1 convolution fills a linear layer and the other way round, since the numbers are the
    same. On the device "meta" keys and shapes are checked and nothing is read.

    Raises:
        ValueError: keys are missing or left over, or a shape is wrong; names the file and the first few keys.
    """
    wanted = module.state_dict()
    check_sources(wanted, sources)
    if torch.device(device).type == "meta":
        nn.Module.to(module, device=device, dtype=dtype)  # that of diffusers warns of lists that are empty
        return
    owners = dict(module.named_modules())
    for name, placeholder in wanted.items():
        value = sources[name].read().reshape(placeholder.shape)
        if on_weight is not None:
            value = on_weight(name, value.to(device))
        stays = not value.is_floating_point() or (on_weight is not None and value.element_size() == 1)
        value = value.to(device=device, dtype=None if stays else dtype)
        _put(owners, name, value)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert not tensor.is_meta, f"{name} was built on the meta device and no file fills it"
        if name not in wanted:
            _put(owners, name, tensor.to(device))


def check_sources(wanted: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    """Raise ValueError unless `sources` are exactly what a module with the state dict `wanted` needs."""
    files = ", ".join(sorted({str(source.file.path) for source in sources.values()})) or "the file"
    missing = [name for name in wanted if name not in sources]
    if missing:
        raise ValueError(f"{files}: {len(missing)} weights are missing: {describe_keys(missing)}")
    unexpected = [source.key for name, source in sources.items() if name not in wanted]
    if unexpected:
        raise ValueError(f"{files}: {len(unexpected)} weights do not belong to this model: {describe_keys(unexpected)}")
    wrong = []
    for name, placeholder in wanted.items():
        found, expected = sources[name].shape, tuple(placeholder.shape)
        if _without_kernel(found) != _without_kernel(expected):
            wrong.append(f"{sources[name].key} has shape {list(found)}, expected {list(expected)}")
    if wrong:
        raise ValueError(f"{files}: {len(wrong)} weights have the wrong shape: {describe_keys(wrong, 3)}")


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution's weight as a linear layer has it."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _put(owners: Mapping[str, nn.Module], name: str, value: Tensor) -> None:
    """Make `value` the parameter or buffer `name`, keeping which of the two it is."""
    prefix, _, leaf = name.rpartition(".")
    owner = owners[prefix]
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
