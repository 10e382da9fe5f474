"""The processes of a run and the numbers it calculates in."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env
from torch import Tensor, distributed
from torch.amp import GradScaler
from torch.optim import Optimizer

from library.flags import deepspeed_launcher, fsdp_launcher
from library.flags.output import LoggingFlags
from library.flags.run import DistributedFlags, PrecisionFlags, StepFlags
from library.flags.settings import Settings
from library.train.trackers import run_directory, wanted_trackers

logger = logging.getLogger(__name__)

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES: Mapping[str, torch.dtype] = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

FIRST_PAUSE, LAST_PAUSE = 0.01, 1.0
"""Seconds between two looks at how many ranks have arrived."""


def make_accelerator(settings: Settings) -> Accelerator:
    """The processes of this run, joined; `settings` decide precision, accumulation and where logs go.

    `backward` divides by --gradient_accumulation_steps. Raises ValueError for fp16 without a GPU, and for a tracker
    without its package or its folder.
    """
    precision, logs = settings[PrecisionFlags], settings[LoggingFlags]
    _check_precision(settings)
    repeatable_matrix_products()
    trackers = wanted_trackers(logs)
    timeout = settings[DistributedFlags].ddp_timeout
    with _without(fsdp_launcher.SWITCH, deepspeed_launcher.SWITCH, deepspeed_launcher.ACCUMULATION):
        accelerator = Accelerator(
            mixed_precision=precision.mixed_precision,
            gradient_accumulation_steps=settings[StepFlags].gradient_accumulation_steps,
            log_with=list(trackers) or None,
            project_dir=None if logs.logging_dir is None else str(run_directory(logs)),
            kwargs_handlers=[] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))],
        )
    if precision.full_fp16 and accelerator.scaler is not None:
        accelerator.scaler = HalfGradScaler(accelerator.device.type)
    return accelerator


def repeatable_matrix_products() -> None:
    """Let MKL give equal products for equal factors, unless the user chose otherwise.

    By default, with several threads on CPUs that have AVX-512, the last bits differ from run to run. MKL reads the
    variable at the first product of a process.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")


def weight_dtype(flags: PrecisionFlags) -> torch.dtype:
    """What frozen models are held and run in."""
    return COMPUTE_DTYPES[flags.mixed_precision]


def trained_dtype(flags: PrecisionFlags) -> torch.dtype:
    """What is trained is held in this: float32, in which small steps are not lost, unless --full_* says otherwise."""
    return weight_dtype(flags) if flags.full_fp16 or flags.full_bf16 else torch.float32


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """What weights are written in; None keeps that of training."""
    return None if save_precision is None else SAVE_DTYPES[save_precision]


def agreed_seed(seed: int | None) -> int:
    """`seed`, or a random one below 2**32 that is the same on every rank."""
    if seed is not None:
        return seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    return drawn[0]


def wait_patiently(what: str) -> None:
    """Return once every rank has called this for `what`, however long the slowest takes.

    A collective would give up after its time-out (10 to 30 minutes) on ranks that are still filling caches; here each
    rank asks the store that the processes met at. When a rank dies, the launcher ends the others. What is waited for
    may come again: a rank cannot come back before all have left.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    store, ranks = distributed.distributed_c10d._get_default_store(), distributed.get_world_size()
    arrived = store.add(what, 1)
    everyone = -(-arrived // ranks) * ranks
    pause = FIRST_PAUSE
    while store.add(what, 0) < everyone:
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)


def mean_of_ranks(tensor: Tensor) -> None:
    """Average `tensor` over the ranks, in place; with one rank nothing is touched."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
        tensor.div_(distributed.get_world_size())  # not every backend can average by itself


def from_first_rank(tensor: Tensor) -> None:
    """Overwrite `tensor` with rank 0's, in place."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(tensor, src=0)


class HalfGradScaler(GradScaler):
    """A loss scaler for weights that are held in fp16, whose gradients are fp16 too.

    The stock one refuses them, since an unscaled fp16 gradient may round to zero; --full_fp16 accepts that.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@contextmanager
def _without(*variables: str) -> Iterator[None]:
    """While the context lasts these environment variables are not set.

    accelerate's own ways of dividing work wrap whole models that are given to them, and read the launcher's answers
    by themselves; to it these are processes like others.
    """
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _check_precision(settings: Settings) -> None:
    """Refuse what the device cannot do, and name a precision of the launcher that does not count."""
    wanted = settings[PrecisionFlags].mixed_precision
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if wanted == "fp16" and on_cpu:
        raise ValueError("--mixed_precision fp16 needs a GPU and this run is on the CPU; use bf16 or no")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", wanted)
    if launched != wanted and not (launched == "no" or settings.given("mixed_precision")):
        logger.warning(
            "accelerate was launched with mixed precision %s, but --mixed_precision is %s and that counts; give it too",
            launched,
            wanted,
        )
