"""The adapters of one network: standing them in, what of them is trained, and how they are saved."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.files.atomic import replacing
from library.files.hashing import precalculate_safetensors_hashes
from library.files.weights import PICKLE_SUFFIXES, open_weights, save_safetensors
from networks.core.adapter import Adapter, Dropout, Strength, stand_in
from networks.core.key_names import AdapterShape, adapter_shapes, check_known, with_own_names
from networks.core.kinds import Kind, Lora, difference_in_file, make_adapter
from networks.core.merge import merge_into
from networks.core.options import NetworkArgs
from networks.core.parameter_groups import LoraPlus, ParameterGroups, Rates, encoder_rates
from networks.core.targets import Target

logger = logging.getLogger(__name__)


class LoraNetwork(nn.Module):
    """Adapters on the layers of text encoders and of a denoiser; they become its children when they are applied.

    With `joint_encoders`, text encoders of equal rates share their parameter groups. `other_names` are names that some
    files have for these adapters, and the names here; such files are read, and written with the names here.
    """

    def __init__(
        self,
        text_encoder_targets: Sequence[Sequence[Target]],
        unet_targets: Sequence[Target],
        multiplier: float = 1.0,
        dropout: Dropout | None = None,
        lora_plus: LoraPlus | None = None,
        kind: Kind | None = None,
        joint_encoders: bool = True,
        other_names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.other_names = other_names or {}
        self.register_load_state_dict_pre_hook(_rename_what_is_loaded)
        self.kind = kind or Lora(NetworkArgs({}, (), ""))
        self.joint_encoders = joint_encoders
        self.strength = Strength(float(multiplier))
        self.dropout = dropout or Dropout()
        self.lora_plus = lora_plus or LoraPlus()
        self.random = random.Random(torch.initial_seed())
        self._encoders = [self._build(targets) for targets in text_encoder_targets]
        self._unet = self._build(unet_targets)

    @property
    def text_encoder_loras(self) -> list[Adapter]:
        """The adapters of all text encoders, in order."""
        return [adapter for pairs in self._encoders for _, adapter in pairs]

    @property
    def unet_loras(self) -> list[Adapter]:
        """The adapters of the denoiser, in order."""
        return [adapter for _, adapter in self._unet]

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Stand the adapters in place of the layers they adapt; those of a part that is left out are forgotten."""
        if not apply_text_encoder:
            self._encoders = []
        if not apply_unet:
            self._unet = []
        for target, adapter in self._pairs():
            self.add_module(target.name, adapter)
            stand_in(target.parent, target.attribute, adapter)
        logger.info(
            "%s on %d layers of the text encoder and %d of the denoiser",
            self.kind.name,
            len(self.text_encoder_loras),
            len(self._unet),
        )

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """The strength of all adapters, or one for each sample of the batches to come, [B]."""
        if isinstance(multiplier, Tensor):
            device = next((parameter.device for parameter in self.parameters()), multiplier.device)
            self.strength.multiplier, self.strength.rows = 1.0, multiplier.to(device, non_blocking=True)
        else:
            self.strength.multiplier, self.strength.rows = float(multiplier), None

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the context lasts the layers answer as if they had no adapter."""
        before, self.strength.enabled = self.strength.enabled, False
        try:
            yield
        finally:
            self.strength.enabled = before

    def prepare_optimizer_params(
        self, text_encoder_lr: Rates, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for the optimizer and a name for each; see the method below."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Rates, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for the optimizer and a name for each.

        A rate that is None or missing is `default_lr`. A part whose rate is 0 or None is not trained, and unless its
        weights came from a file it is not saved either.
        """
        found = ParameterGroups()
        plus = self.lora_plus
        rates = encoder_rates(text_encoder_lr, len(self._encoders), default_lr)
        if self.joint_encoders and len(set(rates)) <= 1:
            every = [pair for pairs in self._encoders for pair in pairs]
            found.add(every, rates[0] if rates else None, plus.text_encoder, "textencoder")
        else:
            for number, (pairs, rate) in enumerate(zip(self._encoders, rates, strict=True), start=1):
                found.add(pairs, rate, plus.text_encoder, f"textencoder {number}")
        found.add(self._unet, default_lr if unet_lr is None else unet_lr, plus.unet, "unet")
        return found.groups, found.names

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """Called once before training."""
        self.requires_grad_(False)
        for adapter in self._trainable():
            for part in adapter.halves():
                for parameter in part:
                    parameter.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Called before each epoch."""
        self.train()

    def seed_step(self, seed: int) -> None:
        """Let the draws of the next step depend on `seed` and nothing else."""
        self.random.seed(seed)

    def on_step_start(self, text_encoder: Any = None, unet: nn.Module | None = None) -> None:
        """Called before each batch: draws who sits it out, and which ranks learn.

        It is drawn here and not in the layers, so that a layer that is computed twice, by checkpointing, decides
        the same both times.
        """
        for _, adapter in self._pairs():
            if not adapter.draws:
                return
            adapter.start_step(self.random)

    def update_norms(self) -> None:
        """Called when the gradient of a step is final, before the step: what GGPO makes of it.

        Raises:
            ValueError: there is GGPO and no gradient.
        """
        for adapter in self._trainable():
            adapter.follow_gradient()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Everything the optimizer changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: an adapter keeps only values of the size of the rank for backward."""

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works."""
        return True

    def load_weights(self, file: str | os.PathLike[str]) -> Any:
        """Read weights; the answer has `missing_keys` and `unexpected_keys`, which are also logged.

        Raises:
            ValueError: no key of the file is known, or a rank is another than this network's.
        """
        weights = with_own_names(read_network_weights(file), self.other_names)
        own = dict(self.named_children())
        unexpected = check_known(weights, own, file)
        for name, shape in adapter_shapes(weights).items():
            if name in own:
                self._check_fit(name, own[name], shape, file)  # type: ignore[arg-type]
        try:
            result = self.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit this model: {error}") from error
        for kind, keys in (("missing in it", result.missing_keys), ("not of this network", unexpected)):
            if keys:
                logger.warning("%s: %d keys are %s, such as %s", file, len(keys), kind, keys[0])
        return result

    def _check_fit(self, name: str, adapter: Adapter, shape: AdapterShape, file: str | os.PathLike[str]) -> None:
        ends = set(adapter.file_tensors())
        if not ends & (set(shape.tensors or ()) - {"alpha"}):
            raise ValueError(
                f"{file}: {name} has {', '.join(sorted(shape.tensors or ()))}, and an adapter of this network "
                f"({self.kind.name}) has {', '.join(sorted(ends))}; choose the --network_module it was made with"
            )
        if adapter.file_rank != shape.rank:
            raise ValueError(
                f"{file}: {name} has rank {shape.rank} and the network has rank {adapter.file_rank}; "
                "set --network_dim to it, or give --dim_from_weights"
            )

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the adapters; `.safetensors` with metadata and hashes, `.ckpt` and `.pt` without."""
        self.write_weights(self.state_dict_for_saving(dtype), file, metadata)

    @staticmethod
    def write_weights(
        tensors: Mapping[str, Tensor], file: str | os.PathLike[str], metadata: Mapping[str, str] | None
    ) -> None:
        """Write what `state_dict_for_saving` gave, perhaps in another thread while training goes on."""
        if Path(file).suffix.lower() in PICKLE_SUFFIXES:
            with replacing(file) as temporary:
                torch.save(dict(tensors), temporary)
            return
        metadata = dict(metadata or {})
        model_hash, legacy_hash = precalculate_safetensors_hashes(tensors, metadata)
        hashes = {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
        save_safetensors(tensors, file, metadata | hashes)

    def state_dict_for_saving(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What belongs in a file, on the CPU, every tensor in `dtype` if given; one without content stays that."""
        return {
            f"{target.name}.{key}": tensor.detach().to("meta" if tensor.is_meta else "cpu", dtype)
            for target, adapter in self._pairs()
            if not adapter.resting
            for key, tensor in adapter.file_tensors().items()
        }

    def merge_to(
        self,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add `weights_sd` times the multiplier to the layers this network was built for; see `merge_into`."""
        weights_sd = with_own_names(weights_sd, self.other_names)
        shapes = adapter_shapes(weights_sd)
        merged = 0
        for target, _ in self._pairs():
            shape = shapes.get(target.name)
            if shape is None or shape.tensors is None:
                continue
            tensors = {end: weights_sd[f"{target.name}.{end}"] for end in shape.tensors}

            def difference(weight: Tensor, tensors: Any = tensors, shape: AdapterShape = shape) -> Tensor:
                placed = {end: tensor.to(weight.device) for end, tensor in tensors.items()}
                return self.strength.multiplier * difference_in_file(placed, shape, weight)

            try:
                merge_into(target.layer.weight, difference, dtype, device)
            except RuntimeError as error:
                layer = f"a layer of shape {list(target.layer.weight.shape)}"
                raise ValueError(f"{target.name} in the file does not fit {layer}: {error}") from error
            merged += 1
        logger.info("merged adapters into %d layers", merged)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Shrink every adapter that adds something of a greater norm than `max_norm` to a weight to just that.

        Returns how many were shrunk, and the mean and the greatest norm afterwards. The device is waited for once.

        Raises:
            ValueError: the norm means nothing for this kind of adapter.
        """
        adapters = [adapter for _, adapter in self._pairs() if not adapter.resting]
        if not adapters:
            return 0, 0.0, 0.0
        found = [norm for adapter in adapters if (norm := adapter.norm()) is not None]
        if len(found) < len(adapters):
            raise ValueError(
                f"--scale_weight_norms: what {self.kind.name} adds to a weight cannot be shrunk so here (OFT turns "
                "weights and keeps their norms; PiSSA starts from large ones); leave it out"
            )
        norms = torch.stack(found)
        ratios = (max_norm / norms).clamp(max=1.0)  # a norm of 0 gives infinity, hence 1
        parameters: list[Tensor] = []
        factors: list[Any] = []
        for adapter, ratio in zip(adapters, ratios.unbind(), strict=True):
            shrinking, count = adapter.shrinking()
            share = ratio.sqrt() if count == 2 else ratio ** (1 / count)
            parameters += shrinking
            factors += [share.to(parameter.dtype) for parameter in shrinking]
        torch._foreach_mul_(parameters, factors)
        after = norms * ratios
        scaled, mean, greatest = torch.stack([(ratios != 1).sum(), after.mean(), after.max()]).tolist()
        return int(scaled), mean, greatest

    def _build(self, targets: Sequence[Target]) -> list[tuple[Target, Adapter]]:
        return [(target, make_adapter(self.kind, target, self.dropout, self.strength)) for target in targets]

    def _pairs(self) -> Iterator[tuple[Target, Adapter]]:
        for pairs in self._encoders:
            yield from pairs
        yield from self._unet

    def _trainable(self) -> Iterator[Adapter]:
        return (adapter for _, adapter in self._pairs() if not adapter.frozen)


def _rename_what_is_loaded(network: LoraNetwork, weights: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """A hook of `load_state_dict`, which loads a copy: files may have other names."""
    if prefix == "":
        renamed = dict(with_own_names(weights, network.other_names))
        weights.clear()
        weights.update(renamed)


def read_network_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    with open_weights(file) as weights:
        return {key: weights.read(key) for key in weights.keys()}
