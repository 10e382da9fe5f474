"""Training a whole Stable Diffusion model: U-Net and text encoder themselves change (DreamBooth, fine-tuning).

"DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
https://arxiv.org/abs/2208.12242. Its prior preservation is a matter of the data: regularisation images come with a
weight of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from library.data.items import Batch
from library.data.summary import dataset_metadata
from library.flags.dreambooth import DreamBoothFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import OutputFlags
from library.flags.run import PrecisionFlags
from library.models.architecture import ImageRequest
from library.models.sd.architecture import StableDiffusion
from library.models.sd.model_writer import FOLDER_KINDS, ModelWriter
from library.train.accelerator import save_dtype, weight_dtype
from library.train.metadata import dataset_resolution, model_spec
from library.train.saving import Writer, snapshot
from library.train.state import ParameterGroups
from library.train.trainer import Trainer

logger = logging.getLogger(__name__)

SINGLE_FILE_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""Whose layout a single file has, as modelspec says it; that of a folder is the family's own entry."""


class TrainedModels:
    """The models that are trained themselves, by the names that files have for these parts."""

    def __init__(self, parts: Mapping[str, nn.Module], text_encoders: Sequence[nn.Module]) -> None:
        self.parts = parts
        self.text_encoders = text_encoders

    @property
    def trains_text_encoder(self) -> bool:
        """Whether gradients reach the text encoder; they may for the first steps only."""
        return any(parameter.requires_grad for encoder in self.text_encoders for parameter in encoder.parameters())

    @contextmanager
    def off(self) -> Iterator[None]:
        """There is no base model beside the trained one; the trainer refuses what would need it."""
        raise AssertionError("a model that is trained itself cannot be switched off")
        yield

    def start_epoch(self) -> None:
        """Nothing to be told."""

    def start_step(self, batch: Batch, seed: int) -> None:
        """Nothing here depends on the batch."""

    def rest(self) -> None:
        """Nothing here depends on the batch."""

    def start_picture(self, request: ImageRequest) -> None:
        """Nothing here depends on the picture."""

    def before_update(self) -> None:
        """Nothing is done to gradients."""

    def finish_update(self) -> None:
        """Nothing is changed after an update."""

    def modules(self) -> list[nn.Module]:
        """What is trained."""
        return list(self.parts.values())

    def norms(self) -> dict[str, float]:
        """Nothing that the log does not say already."""
        return {}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Part -> its weights by our names."""
        return {part: dict(module.named_parameters()) for part, module in self.parts.items()}


class DreamBoothTrainer(Trainer):
    """Trains the U-Net and, unless told otherwise, the text encoder; writes whole models."""

    arch: StableDiffusion
    trained: TrainedModels
    trains_base_model: ClassVar[bool] = True
    tracker_name: ClassVar[str] = "dreambooth"

    @property
    def trains_text_encoder(self) -> bool:
        """Whether it is trained at all."""
        last = self.settings[DreamBoothFlags].stop_text_encoder_training
        return last is None or last > 0

    def build_trainable(self) -> TrainedModels:
        """The models of the run, with weights that take gradients; a text encoder that stays takes little room."""
        self.refuse_images_for_networks()
        parts = {"unet": self.models.denoiser}
        if self.trains_text_encoder:
            (parts["text_encoder"],) = self.models.text_encoders
        else:
            for encoder in self.models.text_encoders:
                encoder.to(weight_dtype(self.settings[PrecisionFlags]))
        for module in parts.values():
            module.train().requires_grad_(True)
        return TrainedModels(parts, self.models.text_encoders)

    def refuse_images_for_networks(self) -> None:
        """ValueError for images whose loss compares a network with the model that it stands in."""
        for dataset in self.data.datasets:
            for subset in dataset.settings.subsets:
                if subset.keeps_prior:
                    raise ValueError(
                        f"{subset.source}: diff_output_preservation compares with the base model, of which nothing is "
                        "left when it is trained itself; use regularisation images (is_reg) and --prior_loss_weight"
                    )

    def parameter_groups(self) -> ParameterGroups:
        """One group a part; that of the text encoder has a rate, and maybe an end, of its own."""
        rate, own = self.settings[OptimizerFlags].learning_rate, self.settings[DreamBoothFlags]
        text_rate = rate if own.learning_rate_te is None else own.learning_rate_te
        rates = {"unet": rate, "text_encoder": text_rate}
        parts = self.trained.parts
        groups = [{"params": list(module.parameters()), "lr": rates[part]} for part, module in parts.items()]
        last = own.stop_text_encoder_training
        ends = {} if last is None else {i: last for i, part in enumerate(parts) if part == "text_encoder"}
        return ParameterGroups(groups, list(parts), ends)

    @cached_property
    def writer(self) -> ModelWriter:
        """What writes the models of this run."""
        output = self.settings[OutputFlags]
        return self.arch.model_writer(output.save_model_as or "safetensors", save_dtype(output.save_precision))

    @cached_property
    def planned(self) -> dict[str, dict[str, Tensor]]:
        """Names, shapes and dtypes of the weights in a file."""
        dtype = save_dtype(self.settings[OutputFlags].save_precision)
        return {
            part: {name: weight.detach().to("meta", dtype) for name, weight in each.items()}
            for part, each in self.trained.weights().items()
        }

    def file_size(self) -> int:
        """Of all three parts."""
        return self.writer.size(self.planned)

    def check_file(self, path: Path) -> None:
        """Reopen a model that was just written and look at every key."""
        self.writer.check(path, self.planned)

    def write_checkpoint(self, step: int, epoch: int) -> Writer:
        """The whole model: what is trained as it is now, the rest as it lies in the base model."""
        dtype = save_dtype(self.settings[OutputFlags].save_precision)
        taken = {part: snapshot(each, dtype) for part, each in self.trained.weights().items()}
        now = datetime.now()

        def write(path: Path) -> None:
            hashes = self.writer.write(path, taken, self.file_metadata(now), step, epoch)
            for name, digest in hashes.items():
                logger.info("%s: sha256 %s", name, digest)

        return write

    def file_metadata(self, now: datetime) -> dict[str, str]:
        """The modelspec entries of a file of the moment `now`."""
        resolution = dataset_resolution(dataset_metadata(self.data))
        spec = self.arch.model_spec()
        if self.writer.kind not in FOLDER_KINDS:
            spec |= {"implementation": SINGLE_FILE_IMPLEMENTATION}
        return model_spec(self.settings, spec, resolution, now, adapter=None)
