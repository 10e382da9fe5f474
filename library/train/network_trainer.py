"""Training a network of adapters, such as LoRA, on top of a frozen model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.data.items import Batch
from library.data.summary import dataset_metadata
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import OutputFlags
from library.flags.run import MemoryFlags, PrecisionFlags
from library.models.architecture import ImageRequest
from library.train.accelerator import save_dtype, trained_dtype
from library.train.given_names import network_module
from library.train.key_check import check_keys, check_network_file
from library.train.metadata import dataset_resolution, file_metadata, training_metadata
from library.train.saving import Saver, Writer, snapshot
from library.train.state import ParameterGroups
from library.train.trainer import Trainer

logger = logging.getLogger(__name__)


class TrainedNetwork:
    """A network of `--network_module` on the models it was applied to, its own or another project's."""

    def __init__(self, network: Any, text_encoder: Any, denoiser: nn.Module, flags: NetworkFlags) -> None:
        self.network = network
        self.flags = flags
        self.text_encoder = text_encoder
        self.denoiser = denoiser
        self.trains_text_encoder = not flags.network_train_unet_only
        self.last_norms: dict[str, float] = {}
        self.by_image = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the context lasts the base model answers."""
        if hasattr(self.network, "off"):
            with self.network.off():
                yield
            return
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)

    def start_epoch(self) -> None:
        """Tell the network that an epoch starts."""
        self.network.on_epoch_start(self.text_encoder, self.denoiser)

    def rest(self) -> None:
        """No batch is on its way: every image gets the network at full strength."""
        if self.by_image:
            self.network.set_multiplier(1.0)
            self.by_image = False

    def start_step(self, batch: Batch, seed: int) -> None:
        """Give the network the multipliers of this batch's images, and the step's seed if it draws by itself."""
        if batch.network_multipliers is not None:
            self.network.set_multiplier(batch.network_multipliers)
            self.by_image = True
        else:
            self.rest()
        if hasattr(self.network, "seed_step"):
            self.network.seed_step(seed)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoder, self.denoiser)

    def start_picture(self, request: ImageRequest) -> None:
        """Nothing here depends on the picture."""

    def before_update(self) -> None:
        """Let a network that follows its gradients look at them."""
        for name in ("update_grad_norms", "update_norms"):
            if hasattr(self.network, name):
                getattr(self.network, name)()

    def finish_update(self) -> None:
        """Scale down what has grown beyond --scale_weight_norms."""
        limit = self.flags.scale_weight_norms
        if limit is None:
            return
        device = next(iter(self.network.parameters())).device
        scaled, mean, largest = self.network.apply_max_norm_regularization(limit, device)
        self.last_norms = {
            "max_norm/keys_scaled": scaled,
            "max_norm/average_key_norm": mean,
            "max_norm/max_key_norm": largest,
        }

    def modules(self) -> list[nn.Module]:
        """The network itself: networks of others are no part of the models."""
        return [self.network]

    def norms(self) -> dict[str, float]:
        """What the last scaling found, for the log."""
        return self.last_norms


class NetworkTrainer(Trainer):
    """Trains `--network_module` on a frozen denoiser and, unless told otherwise, its text encoders."""

    trained: TrainedNetwork

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the network stands in the text encoders too."""
        return not self.settings[NetworkFlags].network_train_unet_only

    def build_trainable(self) -> TrainedNetwork:
        """The network, standing in the models, in the precision it is trained in."""
        flags, models = self.settings[NetworkFlags], self.models
        self.layers = self.arch.adaptable_layers(models.denoiser, models.text_encoders)
        module = network_module(flags)
        self.merge_base_weights(module)
        network = self.create_network(module)
        encoders = self.encoders_for_networks()
        network.apply_to(
            encoders,
            models.denoiser,
            not flags.network_train_unet_only,
            not flags.network_train_text_encoder_only,
        )
        if flags.network_weights is not None:
            logger.info(
                "network weights from %s: %s", flags.network_weights, network.load_weights(flags.network_weights)
            )
        if flags.scale_weight_norms is not None and not hasattr(network, "apply_max_norm_regularization"):
            raise ValueError(f"--scale_weight_norms is not supported by {flags.network_module}")
        network.to(self.device, trained_dtype(self.settings[PrecisionFlags]))
        network.prepare_grad_etc(encoders, models.denoiser)
        if self.settings[MemoryFlags].gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        self.check_network(network)
        return TrainedNetwork(network, encoders, models.denoiser, flags)

    def check_network(self, network: Any) -> None:
        """Refuse, before hours are lost, a network whose file other programs would not load."""
        file = "the file of this network"
        if hasattr(network, "state_dict_for_saving"):
            tensors = network.state_dict_for_saving()
        else:
            tensors = network.state_dict()
        self.judge(lambda: check_keys({key: tuple(value.shape) for key, value in tensors.items()}, self.layers, file))

    def check_file(self, path: Path) -> None:
        """Reopen a file that was just written and look for a place for every key."""
        self.judge(lambda: check_network_file(path, self.layers))

    def judge(self, check: Callable[[], None]) -> None:
        """A key without a place is our mistake, or of LyCORIS; a network module of the user's may know better."""
        package = (self.settings[NetworkFlags].network_module or "").partition(".")[0]
        try:
            check()
        except ValueError as error:
            if package in ("networks", "lycoris"):
                raise
            logger.warning("%s", error)

    def encoders_for_networks(self) -> Any:
        """One text encoder by itself, several as a list: how every network module has always been called."""
        views = self.arch.network_views(self.models.text_encoders)
        return views[0] if len(views) == 1 else views

    def merge_base_weights(self, module: Any) -> None:
        """Merge `--base_weights` into the frozen models, each with its own strength."""
        flags, models = self.settings[NetworkFlags], self.models
        files = flags.base_weights or ()
        strengths = flags.base_weights_multiplier or ()
        if len(strengths) > len(files):
            raise ValueError(f"--base_weights_multiplier has {len(strengths)} values for {len(files)} --base_weights")
        encoders = self.encoders_for_networks()
        for index, file in enumerate(files):
            strength = strengths[index] if index < len(strengths) else 1.0
            logger.info("merging %s into the base model, times %s", file, strength)
            network, weights = module.create_network_from_weights(
                strength, file, models.vae, encoders, models.denoiser, for_inference=True
            )
            network.merge_to(encoders, models.denoiser, weights, self.dtype, self.device)

    def create_network(self, module: Any) -> Any:
        """A network of the shape the flags or the `--network_weights` file ask for."""
        flags, models = self.settings[NetworkFlags], self.models
        encoders = self.encoders_for_networks()
        arguments = network_arguments(flags)
        if flags.dim_from_weights:
            network, _ = module.create_network_from_weights(
                1.0, flags.network_weights, models.vae, encoders, models.denoiser, **arguments
            )
            return network
        arguments.setdefault("dropout", flags.network_dropout)
        return module.create_network(
            1.0,
            flags.network_dim,
            flags.network_alpha,
            models.vae,
            encoders,
            models.denoiser,
            neuron_dropout=flags.network_dropout,
            **arguments,
        )

    def parameter_groups(self) -> ParameterGroups:
        """The network's own groups; what is in none of them is neither trained nor counted."""
        rates, network = self.settings[OptimizerFlags], self.trained.network
        text_rates = rates.text_encoder_lr
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
            answer = network.prepare_optimizer_params_with_multiple_te_lrs(
                text_rates, rates.unet_lr, rates.learning_rate
            )
        else:
            first = self.one_rate(text_rates)
            answer = network.prepare_optimizer_params(first, rates.unet_lr, rates.learning_rate)
        groups, names = answer if isinstance(answer, tuple) else (answer, None)
        groups = [group | {"params": list(group["params"])} for group in groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if not trained:
            raise ValueError(
                "there is nothing to train: every learning rate is 0, or --network_args leaves no layer; "
                "see --learning_rate, --unet_lr, --text_encoder_lr"
            )
        return ParameterGroups(groups, list(names) if names else [f"group{i}" for i in range(len(groups))])

    def one_rate(self, rates: Sequence[float] | None) -> float | None:
        """The learning rate of all text encoders, for a network that knows only one.

        Raises:
            ValueError: there are several.
        """
        if rates and len(set(rates)) > 1 and self.trains_text_encoder:
            raise ValueError(
                f"--network_module {self.settings[NetworkFlags].network_module} takes one learning rate for all text "
                f"encoders, and --text_encoder_lr has {' and '.join(f'{rate:g}' for rate in rates)}; give one"
            )
        return rates[0] if rates else None

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The ss_* entries that are the same for all files of the run."""
        return training_metadata(self.settings, self.arch, dataset_metadata(self.data), self.known)

    def write_checkpoint(self, step: int, epoch: int) -> Writer:
        """The network's file as of now, with what its metadata says about this moment."""
        network = self.trained.network
        dtype = save_dtype(self.settings[OutputFlags].save_precision)

        def metadata() -> dict[str, str]:
            resolution = dataset_resolution(self.metadata)
            return file_metadata(
                self.settings, self.arch, self.metadata, self.hashes, step=step, epoch=epoch, resolution=resolution
            )

        if not hasattr(network, "write_weights"):
            return written_at_once(network, self.saver, dtype, metadata())
        tensors = snapshot(network.state_dict_for_saving(), dtype)
        return lambda path: network.write_weights(tensors, path, metadata())


def written_at_once(network: Any, saver: Saver, dtype: torch.dtype | None, metadata: dict[str, str]) -> Writer:
    """A network of others reads its own parameters when it writes: it does so now, and the file is moved later."""
    saver.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=saver.directory))
    file = folder / saver.path("network").name
    network.save_weights(str(file), dtype, metadata)

    def move(path: Path) -> None:
        os.replace(file, path)
        folder.rmdir()

    return move


def network_arguments(flags: NetworkFlags) -> dict[str, Any]:
    """`--network_args` as the keywords of the network's constructor; values stay text."""
    return dict(pair.split("=", 1) for pair in flags.network_args or ())
