"""Which images a run works on, and in which batches they come: its settings -> the training set and its loader."""

from __future__ import annotations

import logging

from accelerate import Accelerator

from library.data.config import DatasetConfig, read_dataset_config
from library.data.custom import custom_training_set
from library.data.dataset import TrainingSet, load_training_set
from library.data.loader import Loader, make_loader
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.monitor import ValidationFlags
from library.flags.objective import LossFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.state import Plan

logger = logging.getLogger(__name__)


def images_of_run(settings: Settings, arch: Architecture, *, seed: int, control: bool = False) -> TrainingSet:
    """The images of a training with these settings; `seed` is the training's, `control` that it trains on pairs.

    A ValueError says what is wrong with dataset file, folders or images.
    """
    flags, loss = settings[DatasetFlags], settings[LossFlags]
    if flags.dataset_class is not None:
        return custom_training_set(flags)
    config = read_dataset_config(
        flags,
        settings[CaptionFlags],
        settings[ValidationFlags],
        bucket_multiple=arch.bucket_multiple,
        masked_loss=loss.masked_loss,
        control=control,
        seed=seed,
    )
    _report_masks(config, loss.masked_loss)
    return load_training_set(
        config,
        prior_loss_weight=loss.prior_loss_weight,
        allow_uncaptioned=flags.allow_uncaptioned,
        skip_corrupt=flags.skip_corrupt,
    )


def loader_of_run(settings: Settings, data: TrainingSet, plan: Plan, accelerator: Accelerator, seed: int) -> Loader:
    """The batches of this rank, made by the workers that the settings ask for."""
    flags = settings[DatasetFlags]
    return make_loader(
        data,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=flags.max_data_loader_n_workers,
        persistent=flags.persistent_data_loader_workers,
        total_steps=plan.steps,
        accumulation=plan.accumulation,
        pin_memory=accelerator.device.type == "cuda",
    )


def _report_masks(config: DatasetConfig, masked_loss: bool) -> None:
    """Say where masks come from: a mask that is not used, or is used unnoticed, costs a training."""
    subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
    if masked_loss and not any(subset.conditioning_data_dir or subset.alpha_mask for subset in subsets):
        logger.warning("--masked_loss has no effect: no subset has masks (conditioning_data_dir, or alpha_mask)")
    for subset in subsets:
        if subset.alpha_mask:
            logger.info("%s: the alpha channel weighs the loss", subset.source)
        elif masked_loss and subset.conditioning_data_dir:
            logger.info("%s: masks in %s weigh the loss", subset.source, subset.conditioning_data_dir)
