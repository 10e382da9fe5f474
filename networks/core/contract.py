"""What the trainer calls on a network module and on a network; `--network_module` is imported by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class NetworkModule(Protocol):
    """A Python module that builds networks, such as `networks.lora` or `lycoris.kohya`."""

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module],
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> Network:
        """A network for the given models; `kwargs` are the `--network_args`, as text."""
        ...

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module],
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[Network, Mapping[str, Tensor]]:
        """A network of the shape that `file` or `weights_sd` has, and the weights, not yet loaded into it."""
        ...


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
