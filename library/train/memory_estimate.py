"""How much memory a run will need, and what to change when that is too much."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from library.data.dataset import TrainingSet
from library.data.items import Batch
from library.diffusion.process import Draws
from library.flags.dataset import CacheFlags, DatasetFlags, TextCacheFlags
from library.flags.dreambooth import DreamBoothFlags
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import EmaFlags
from library.flags.run import AUTO, LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.accelerator import COMPUTE_DTYPES
from library.train.encoders_on_demand import EncodersOnDemand
from library.train.memory import MemoryRoom
from library.train.optimizer import choose_optimizer, make_optimizer
from library.train.peak_memory import step_peak
from library.train.run_sheet import Table, gigabytes
from library.train.state import Models, ParameterGroups, Trained
from library.train.step import step_loss

logger = logging.getLogger(__name__)

CUDA_RESERVE = 600_000_000
"""Bytes that a process takes on a GPU before it has made a tensor: driver, kernels, workspaces of cuDNN and cuBLAS."""
FRAGMENTATION = 0.1
"""Part of the memory of a step that lies in gaps between tensors."""
VAE_FEATURES = 3 * 128
"""Numbers per pixel that the encoder of the VAE holds at once, at its first level: three tensors of 128 channels."""
SAMPLE_SIDE = 128
"""The optimizer's state is measured on a matrix of this side: 8-bit optimizers keep smaller ones in 32 bits."""


@dataclass(frozen=True)
class Need:
    """One thing that takes memory."""

    name: str
    size: int
    how: str


@dataclass(frozen=True)
class Estimate:
    """All that takes memory on the device during training."""

    needs: tuple[Need, ...]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(need.size for need in self.needs)

    def table(self) -> Table:
        """For the console."""
        rows = [(need.name, gigabytes(need.size), need.how) for need in self.needs]
        return Table("memory", ("for", "bytes", "how it was found"), (*rows, ("in all", gigabytes(self.total), "")))


def estimate_memory(
    settings: Settings,
    arch: Architecture,
    room: MemoryRoom,
    models: Models,
    trained: Trained,
    groups: ParameterGroups,
    data: TrainingSet,
    on_gpu: bool,
) -> Estimate:
    """What a run with these models, which lie on the meta device, will hold on its device.

    The models cannot be used for anything else afterwards.
    """
    parameters = [parameter for group in groups.groups for parameter in group["params"]]
    of_trained = sum(parameter.nbytes for parameter in parameters)
    vae = None if settings[CacheFlags].cache_latents else models.vae
    needs = [
        *frozen_weights(room, models, vae, known={id(parameter) for parameter in parameters}),
        Need("trained weights", of_trained, f"{_count(parameters):,} numbers"),
        gradients(settings[OptimizerFlags], parameters),
        optimizer_state(settings[OptimizerFlags], parameters),
    ]
    if settings[EmaFlags].ema_decay is not None:
        needs.append(Need("moving average", of_trained, "a copy of the trained weights"))
    batch_size, (width, height) = largest_batch(data)
    peak, how = activations(settings, arch, room, models, trained, batch_size, (width, height))
    step = Need("one step", int(peak * (1 + FRAGMENTATION)), f"{how} of {batch_size} x {width}x{height}")
    needs.append(step)
    if vae is not None:
        needs += vae_at_work(vae, batch_size * width * height, step)
    if on_gpu:
        needs.append(Need("GPU reserve", CUDA_RESERVE, "driver, kernels, workspaces"))
    return Estimate(tuple(needs))


def frozen_weights(room: MemoryRoom, models: Models, vae: nn.Module | None, known: set[int]) -> list[Need]:
    """The models, `vae` if it stays, without the parameters whose ids are `known`: those are trained."""
    frozen = {"denoiser": [models.denoiser], "text encoders": models.text_encoders, "VAE": [] if vae is None else [vae]}
    needs = [
        Need(name, weight_bytes(modules, known), "weights of the file")
        for name, modules in frozen.items()
        if has_weights(modules, known)
    ]
    if text := room.said_to_be_away():
        needs[0] = Need("denoiser", needs[0].size - room.bytes_away(models.denoiser), text)
    return needs


def optimizer_state(flags: OptimizerFlags, parameters: Sequence[nn.Parameter]) -> Need:
    """What the optimizer remembers of each number."""
    each = optimizer_bytes(flags)
    return Need("optimizer", int(_count(parameters) * each), f"{each:.3g} bytes a number, measured on a small one")


def vae_at_work(vae: nn.Module, pixels: int, step: Need) -> list[Need]:
    """What the VAE needs for a batch of so many `pixels` beyond what a `step` has: they do not come together."""
    each = next(vae.parameters()).element_size()
    size = pixels * VAE_FEATURES * each - step.size
    text = f"{VAE_FEATURES} numbers of {each} bytes a pixel, less what a step has"
    return [Need("VAE at work", size, text)] if size > 0 else []


def gradients(flags: OptimizerFlags, parameters: Sequence[nn.Parameter]) -> Need:
    """All gradients at once, or with updates during the backward pass the largest."""
    sizes = [parameter.nbytes for parameter in parameters]
    if flags.fused_backward_pass:
        return Need("gradients", max(sizes, default=0), "one at a time")
    return Need("gradients", sum(sizes), "one for each")


def has_weights(modules: Sequence[nn.Module], without: set[int]) -> bool:
    """Whether any parameter is not among those whose ids are in `without`: a part may be trained as a whole."""
    return any(id(parameter) not in without for module in modules for parameter in module.parameters())


def weight_bytes(modules: Sequence[nn.Module], without: set[int]) -> int:
    """Bytes of all parameters and buffers but those whose ids are in `without`."""
    tensors = {
        id(tensor): tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]
    }  # a shared one counts once
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in without)


def optimizer_bytes(flags: OptimizerFlags) -> float:
    """Bytes of optimizer state for each trained number, found by one step of the optimizer on a small matrix.

    Where it cannot step, as some do only on a GPU, its name tells: 2 bytes for 8-bit ones, 8 for all others.
    """
    logger_of_optimizer = logging.getLogger(choose_optimizer.__module__)
    level = logger_of_optimizer.level
    # Not zeros, of which Prodigy keeps no copy.
    parameter = nn.Parameter(torch.full((SAMPLE_SIDE, SAMPLE_SIDE), 0.1))
    parameter.grad = torch.ones_like(parameter)
    logger_of_optimizer.setLevel(logging.ERROR)
    try:
        optimizer = make_optimizer(flags, [{"params": [parameter]}])
        optimizer.step()
        state = optimizer.state[parameter]
    except (ImportError, RuntimeError, AttributeError, OSError):
        return 2.0 if "8bit" in (flags.optimizer_type or "") else 8.0
    finally:
        logger_of_optimizer.setLevel(level)
    sizes = [value.nbytes for value in state.values() if isinstance(value, Tensor)]
    return sum(sizes) / parameter.numel()


def largest_batch(data: TrainingSet) -> tuple[int, tuple[int, int]]:
    """Images of the batch with the most pixels, and their width and height."""
    sizes = [
        (min(dataset.settings.batch_size, bucket.count), bucket.size)
        for dataset in data.datasets
        for bucket in dataset.buckets
    ]
    return max(sizes, key=lambda entry: entry[0] * entry[1][0] * entry[1][1])


def activations(
    settings: Settings,
    arch: Architecture,
    room: MemoryRoom,
    models: Models,
    trained: Trained,
    batch_size: int,
    size: tuple[int, int],
) -> tuple[int, str]:
    """Bytes that one step holds at once, and how that is known."""
    room.attach(models, trained)
    width, height = size
    stride, channels = arch.latents.stride, arch.latents.channels
    precision = COMPUTE_DTYPES[settings[PrecisionFlags].mixed_precision]
    captions = ["a"] * batch_size
    text: dict[str, Tensor] = {}
    if settings.get(TextCacheFlags).cache_text_encoder_outputs:
        with torch.no_grad():
            text = EncodersOnDemand(arch, room).encode(captions)

    def step() -> Tensor:
        latents = torch.empty(batch_size, channels, height // stride, width // stride)
        cached = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in text.items()}
        batch = Batch(captions, torch.ones(batch_size), latents=latents, text=cached)
        trained.start_step(batch, 0)
        return step_loss(batch, arch, models, trained, Draws.seeded(0))

    autocast = None if precision == torch.float32 else precision
    modules = [models.denoiser, *models.text_encoders, *trained.modules()]
    try:
        return step_peak(modules, step, autocast, 2 if room.plans else 1), "a step without content"
    except Exception as error:  # networks of others and optional kernels may not run without content
        logger.warning("the memory of a step cannot be estimated: %s: %s", type(error).__name__, error)
        return 0, "unknown; a step"


def device_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that a run may take, and of what."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free, f"free on {torch.cuda.get_device_name(device)}"
    return psutil.virtual_memory().available, "free main memory"


def cures(settings: Settings) -> list[str]:
    """What to change so that a run needs less memory, what costs least first; without what is done already."""
    precision, memory, optimizer = settings[PrecisionFlags], settings[MemoryFlags], settings[OptimizerFlags]
    name = (optimizer.optimizer_type or "AdamW").lower()
    cache, dataset = settings[CacheFlags], settings[DatasetFlags]
    network = settings.takes(NetworkFlags)
    whole = settings.takes(DreamBoothFlags) and not network
    last = settings.get(DreamBoothFlags).stop_text_encoder_training
    options = [
        (cache.cache_latents and cache.vae_batch_size > 1, "--vae_batch_size=1: while the caches are filled"),
        (not cache.cache_latents, "--cache_latents: the VAE leaves the device before training"),
        (
            precision.mixed_precision == "no",
            "--mixed_precision=bf16 (fp16 on older GPUs): half of what a step holds, and of frozen weights",
        ),
        (not _has_fast_attention(settings), "--sdpa: attention that keeps no table of all pairs"),
        *_cures_of_weights(settings),
        (
            not memory.gradient_checkpointing and memory.activation_memory is None,
            "--gradient_checkpointing: about a third slower, much less for a step",
        ),
        (memory.activation_memory == AUTO, "--activation_memory with a number, below what auto chose: pictures differ"),
        (memory.activation_memory not in (None, AUTO), "a smaller --activation_memory: more is computed again"),
        (
            memory.gradient_checkpointing and not memory.cpu_offload_checkpointing,
            "--cpu_offload_checkpointing: what is needed to compute again waits in main memory",
        ),
        (
            name == "adafactor" and not optimizer.fused_backward_pass and precision.mixed_precision != "fp16",
            "--fused_backward_pass: one gradient at a time, without --gradient_accumulation_steps",
        ),
        (name in ("adamw", "adam"), "--optimizer_type=AdamW8bit: a quarter of the optimizer's state"),
        (
            bool(dataset.dataset_config) or dataset.train_batch_size > 1,
            "a smaller train_batch_size, with --gradient_accumulation_steps to make up for it",
        ),
        (
            network and not settings.get(NetworkFlags).network_train_unet_only,
            "--network_train_unet_only: nothing is kept for the text encoder's gradient",
        ),
        (
            whole and (last is None or last > 0),
            "--stop_text_encoder_training=-1: no gradient and no optimizer's state for the text encoder",
        ),
        (
            whole and not (precision.full_bf16 or precision.full_fp16),
            "--full_bf16: half the weights and gradients; small steps are rounded away",
        ),
        (not whole, "a smaller --network_dim, then a lower resolution"),
        (whole, "a lower resolution"),
    ]
    return [text for applies, text in options if applies]


def _cures_of_weights(settings: Settings) -> list[tuple[bool, str]]:
    """Smaller weights of the base model, and weights elsewhere; they cost less than computing again."""
    precision, large = settings[PrecisionFlags], settings.get(LargeModelFlags)
    in_full = precision.mixed_precision != "no" and not (precision.fp8_base or precision.fp8_base_unet)
    return [
        (settings.takes(LargeModelFlags) and in_full and not large.fp8_scaled, "--fp8_scaled: half the transformer"),
        (
            settings.takes(LargeModelFlags) and not large.blocks_to_swap,
            "--blocks_to_swap=auto: weights wait in main memory and come when they are needed",
        ),
        (
            not settings.takes(DreamBoothFlags) and not settings.takes(LargeModelFlags) and in_full,
            "--fp8_base_unet: half the U-Net, rounded",
        ),
    ]


def _count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _has_fast_attention(settings: Settings) -> bool:
    values = settings.values()
    return bool(values.get("sdpa") or values.get("xformers"))
