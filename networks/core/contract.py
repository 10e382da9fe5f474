"""What the trainer calls on a network module and on a network; `--network_module` is imported by name.

A network module, ours or anybody's such as `lycoris.kohya`, has two functions, `create_network` and
`create_network_from_weights`. They are called as `create` and `create_from_weights` below are without their first two
arguments: one of our modules is a kind of adapter and what puts it on the layers of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from networks.core.adapter import Dropout
from networks.core.kinds import Kind, known_args
from networks.core.network import read_network_weights
from networks.core.options import NetworkArgs
from networks.core.training_args import read_dropout

Made = TypeVar("Made", bound="Network")


def create(
    kind: type[Kind],
    build: Callable[[NewNetwork], Made],
    /,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> Made:
    """A network of rank `network_dim` (4) and alpha `network_alpha` (that of the kind; 0 means the rank).

    Raises:
        ValueError: the models are not of the family, or `network_args` hold an unknown key or a bad value.
    """
    encoders = _as_tuple(text_encoder)
    return build(NewNetwork(kind, encoders, unet, multiplier, neuron_dropout, network_args, network_dim, network_alpha))


def create_from_weights(
    kind: type[Kind],
    build: Callable[[StoredNetwork], tuple[Made, Mapping[str, Tensor]]],
    /,
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[Made, Mapping[str, Tensor]]:
    """A network with the layers, ranks and alphas of `file` or `weights_sd`, and the weights, not yet loaded into it.

    Adapters of other kinds (LoHa, LoKr, OFT, DoRA) in the file are those kinds in the network.

    Raises:
        ValueError: as for `create`, or no key of the weights belongs to these models.
    """
    encoders = _as_tuple(text_encoder)
    return build(
        StoredNetwork(kind, encoders, unet, multiplier, neuron_dropout, network_args, file, weights_sd, for_inference)
    )


@dataclass(frozen=True)
class NetworkRequest:
    """What `create` and `create_from_weights` were called with, as far as it is the same for both."""

    kind: type[Kind]
    text_encoders: tuple[nn.Module, ...]
    unet: nn.Module
    multiplier: float
    neuron_dropout: float | None
    """--network_dropout."""
    network_args: Mapping[str, Any]
    """--network_args, as text."""

    def read_args(self, of_family: Sequence[str]) -> NetworkArgs:
        """The --network_args; besides those of every network, the kind's and `of_family` are known.

        Raises:
            ValueError: there is another.
        """
        return NetworkArgs(self.network_args, known_args(self.kind, of_family), self.kind.name)

    def read_dropout(self, args: NetworkArgs) -> Dropout:
        """What is left out at random while it is trained.

        Raises:
            ValueError: a probability is not one.
        """
        return read_dropout(args, self.neuron_dropout)


@dataclass(frozen=True)
class NewNetwork(NetworkRequest):
    """A network that is to be made from nothing."""

    network_dim: int | None
    network_alpha: float | None

    @property
    def rank(self) -> int:
        """--network_dim (4).

        Raises:
            ValueError: it is less than 1.
        """
        rank = 4 if self.network_dim is None else self.network_dim
        if rank < 1:
            raise ValueError(f"--network_dim {rank}: expected 1 or more")
        return rank

    @property
    def alpha(self) -> float:
        """--network_alpha; 0 means the rank."""
        return self.kind.default_alpha if self.network_alpha is None else float(self.network_alpha)


@dataclass(frozen=True)
class StoredNetwork(NetworkRequest):
    """A network that is to have the shape of one in a file."""

    file: str | None
    weights: Mapping[str, Tensor] | None
    """Those of the file, if they have been read already."""
    for_inference: bool

    def read_weights(self) -> Mapping[str, Tensor]:
        """All tensors, on the CPU."""
        if self.weights is not None:
            return self.weights
        assert self.file is not None, "either a file or its weights"
        return read_network_weights(self.file)

    def read_dropout(self, args: NetworkArgs) -> Dropout:
        """Nothing is left out of a network that makes pictures."""
        return Dropout() if self.for_inference else super().read_dropout(args)


class Network(Protocol):
    """A set of adapters on the layers of a denoiser and its text encoders; an `nn.Module`.

    Optional, asked for by name: `prepare_optimizer_params_with_multiple_te_lrs`, `prepare_network`,
    `apply_max_norm_regularization`, `seed_step`, `on_step_start`, `update_grad_norms` and `update_norms` (before each
    optimizer step, when the gradient is final), `merge_to`, `set_multiplier`, `is_mergeable`, and `write_weights` with
    `state_dict_for_saving`, for saving in a thread.
    """

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Stand the adapters in place of the layers they adapt."""
        ...

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> Any:
        """Parameter groups for the optimizer, or those and a name for each."""
        ...

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """Called once before training."""
        ...

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Called before each epoch."""
        ...

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """Everything the optimizer changes."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Called when --gradient_checkpointing is given."""
        ...

    def load_weights(self, file: str) -> Any:
        """Read weights of the same shape."""
        ...

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Write the adapters."""
        ...


def _as_tuple(text_encoder: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """One text encoder comes by itself, several as a list: how every network module has always been called."""
    return (text_encoder,) if isinstance(text_encoder, nn.Module) else tuple(text_encoder)
