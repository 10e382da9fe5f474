"""Training a small network that makes a frozen model follow a second image, such as a drawing of edges."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from library.data.items import Batch
from library.data.summary import dataset_metadata
from library.files.weights import open_weights
from library.flags.lllite import LlliteFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import OutputFlags
from library.flags.run import PrecisionFlags
from library.models.architecture import ImageRequest
from library.models.control_image import CONTROL_IMAGE, read_control
from library.train.accelerator import save_dtype, trained_dtype
from library.train.metadata import dataset_resolution, model_spec
from library.train.saving import Writer, snapshot
from library.train.state import ParameterGroups
from library.train.trainer import Trainer

SMALLEST = 8
"""Side to which the picture of a prompt is scaled to see that it can be read."""


class ControlNetwork(Protocol):
    """What the trainer asks of a network, which is an `nn.Module` as well."""

    def apply_to(self) -> None:
        """Stand in the layers of the denoiser it was made for."""
        ...

    def set_cond_image(self, image: Tensor | None) -> None:
        """The picture to follow, [n, 3, H, W] in [-1, 1]; None for none."""
        ...

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """How strongly it is followed: one number, or [B]."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """While the context lasts the denoiser answers as if there were no network."""
        ...

    def write_weights(self, tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
        """Write what `state_dict` gave."""
        ...


class TrainedControl:
    """A network that follows the conditioning images of its batches."""

    trains_text_encoder = False

    def __init__(self, network: Any) -> None:
        self.network = network

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the context lasts the base model answers."""
        with self.network.off():
            yield

    def start_epoch(self) -> None:
        """Nothing here depends on the epoch."""

    def start_step(self, batch: Batch, seed: int) -> None:
        """Show the network the second images.

        Raises:
            ValueError: there are none.
        """
        if batch.conditioning is None:
            raise ValueError(
                f"no conditioning images with {', '.join(batch.paths) or 'a batch'}: a --dataset_class for this script "
                "gives each batch its `conditioning`"
            )
        self.network.set_cond_image(batch.conditioning)
        self.network.set_multiplier(1.0 if batch.network_multipliers is None else batch.network_multipliers)

    def rest(self) -> None:
        """The pictures of the last batch are for nobody any more."""
        self.network.set_cond_image(None)
        self.network.set_multiplier(1.0)

    def start_picture(self, request: ImageRequest) -> None:
        """Show the network the picture that this prompt names."""
        assert request.height and request.width, "a complete request"
        self.network.set_cond_image(read_control(Path(request.extras[CONTROL_IMAGE]), request.height, request.width))

    def before_update(self) -> None:
        """Nothing is done to gradients."""

    def finish_update(self) -> None:
        """Nothing is changed after an update."""

    def modules(self) -> list[nn.Module]:
        """The network."""
        return [self.network]

    def norms(self) -> dict[str, float]:
        """Nothing that the log does not say already."""
        return {}


class ControlTrainer(Trainer):
    """Trains a network on image pairs; the model and its text encoders are frozen."""

    trained: TrainedControl
    trains_on_pairs: ClassVar[bool] = True
    picture_options: ClassVar[frozenset[str]] = frozenset({CONTROL_IMAGE})
    tracker_name: ClassVar[str] = "lllite_control_net_train"
    kind: ClassVar[str]
    """What modelspec calls such a network."""

    @abstractmethod
    def make_network(self, denoiser: nn.Module, flags: LlliteFlags) -> ControlNetwork:
        """A network for `denoiser` of the sizes that `flags`, or their file, ask for, with that file's weights."""

    @property
    def trains_text_encoder(self) -> bool:
        """It is not."""
        return False

    def check_picture(self, request: ImageRequest) -> None:
        """ValueError for a prompt that does not name a picture to follow, or one that cannot be read."""
        if CONTROL_IMAGE not in request.extras:
            raise ValueError("there is no picture to follow; add one with --cn file.png")
        read_control(Path(request.extras[CONTROL_IMAGE]), SMALLEST, SMALLEST)

    def build_trainable(self) -> TrainedControl:
        """The network, standing in the denoiser, in the precision it is trained in."""
        network: Any = self.make_network(self.models.denoiser, self.settings[LlliteFlags])
        network.to(self.device, trained_dtype(self.settings[PrecisionFlags]))
        network.train().requires_grad_(True)
        network.apply_to()
        return TrainedControl(network)

    def parameter_groups(self) -> ParameterGroups:
        """One group.

        Raises:
            ValueError: its learning rate is 0.
        """
        rate = self.settings[OptimizerFlags].learning_rate
        if rate == 0:
            raise ValueError("there is nothing to train: --learning_rate is 0")
        return ParameterGroups([{"params": list(self.trained.network.parameters()), "lr": rate}], ["control"])

    @property
    def saved_dtype(self) -> torch.dtype | None:
        """That of --save_precision; None for that of the training."""
        return save_dtype(self.settings[OutputFlags].save_precision)

    def check_file(self, path: Path) -> None:
        """Reopen a file that was just written and look at every key."""
        expected = {key: tuple(value.shape) for key, value in self.trained.network.state_dict().items()}
        with open_weights(path) as file:
            found = {key: file.shape(key) for key in file.keys()}
        if found != expected:
            wrong = sorted(dict(found.items() ^ expected.items()))
            raise ValueError(f"{path}: {len(wrong)} keys are missing or of another shape, the first {wrong[0]}")

    def write_checkpoint(self, step: int, epoch: int) -> Writer:
        """The network's file as of now."""
        network, now = self.trained.network, datetime.now()
        tensors = snapshot(network.state_dict(), self.saved_dtype)
        write: Callable[..., None] = network.write_weights
        return lambda path: write(tensors, path, self.file_metadata(now))

    def file_metadata(self, now: datetime) -> dict[str, str]:
        """The modelspec entries of a file of the moment `now`."""
        resolution = dataset_resolution(dataset_metadata(self.data))
        return model_spec(self.settings, self.arch.model_spec(), resolution, now, adapter=self.kind)
