"""Where the weights and activations of a run lie: what the settings ask for, done to its models."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from library.flags.fsdp_launcher import Sharding
from library.flags.run import AUTO, LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.memory.activation_plan import ActivationPlan
from library.memory.block_swap import BUFFERS, BlockSwap, settle, spread_evenly, streamed_bytes
from library.memory.checkpointing import Checkpointed, Recompute, checkpoint_blocks
from library.memory.compilation import compile_blocks, known_backends
from library.memory.copier import Copier, ElsewhereCopier, make_copier
from library.memory.fp8 import Format, Quantizer, Scaling
from library.memory.fp8_matmul import Float8Linear, is_available
from library.memory.frozen_layers import FrozenLinear, attach_frozen_layers, round_weights
from library.memory.host_layers import attach_host_layers
from library.memory.input_offload import InputOffload
from library.memory.sharding import WHOLE_AT_ONCE, bytes_at_once, divide, weight_bytes
from library.models.architecture import Architecture, SwapGroup
from library.train.state import Models, Trained

logger = logging.getLogger(__name__)

GIGABYTE = 1e9
MARGIN = 0.05
"""Part of the device's memory that automatic choices leave free: buckets differ, and torch keeps gaps."""
META = torch.device("meta")
KEPT_WHOLE = "whole from the forward pass until backward has used them"


class MemoryRoom:
    """The memory flags of a run; asked while its models are read, and once when everything trained stands in them.

    On the device "meta" nothing is moved or compiled: weights and activations have their sizes, for an estimate.

    `sharding` says how the launcher wants frozen weights divided among `ranks` processes; a single one keeps all.

    Attributes:
        streams: the blocks that lie in main memory, if any.
        hosted: layers that lie in main memory and are calculated there.
        sharding: how the denoiser is divided, if it is.
        plan: what each block keeps for backward, where --activation_memory decides.
    """

    def __init__(
        self,
        settings: Settings,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        sharding: Sharding | None = None,
        ranks: int = 1,
    ) -> None:
        large = settings.get(LargeModelFlags)
        self.dtype = dtype
        self.device = device
        self.sharding = sharding if ranks > 1 else None
        self.ranks = ranks
        self.streams: BlockSwap | None = None
        self.hosted: list[nn.Linear] = []
        self.plan: ActivationPlan | None = None
        self.streamed: list[int] = []
        """Numbers of the blocks that lie in main memory at first."""
        self._flags = settings[MemoryFlags]
        self._precision = settings[PrecisionFlags]
        self._scaled = large.fp8_scaled
        self._multiplies = large.fp8_matmul
        self._swap = large.blocks_to_swap or 0
        self._hosts = large.cpu_modulation
        self._arch = arch
        self._updates = 0
        self._check()

    def _check(self) -> None:
        if self._scaled and self._arch.quantized is None:
            raise ValueError(f"--fp8_scaled is not for {self._arch.name} models: use --fp8_base")
        backend = self._flags.dynamo_backend
        if self._flags.torch_compile and backend not in (backends := known_backends()):
            raise ValueError(f"--dynamo_backend {backend}: this installation of torch has {', '.join(backends)}")
        if self._multiplies and not is_available(self.device):
            raise ValueError("--fp8_matmul needs a GPU that calculates in float8: RTX 40 or later, H100 or later")

    def load_denoiser(self) -> nn.Module:
        """The denoiser, in the format and place that the settings ask for."""
        quantizer = self._quantizer()
        stays = (self._swap or self._hosts) and self.device != META
        waits = stays or (self.sharding is not None and self.device != META)
        place = torch.device("cpu") if waits else self.device
        denoiser = self._arch.load_denoiser(self.dtype, place, quantizer)
        if quantizer is not None and self.device == META:
            round_weights(denoiser, quantizer)
        blocks = self._arch.blocks(denoiser)
        self.streamed = self._blocks_to_stream(denoiser, blocks)
        self.hosted = self._arch.vector_layers(denoiser) if self._hosts else []
        looked_up = {layer for index in self.streamed for layer in blocks[index].modules()} | set(self.hosted)
        kind = Float8Linear if self._multiplies else FrozenLinear
        scales = {} if quantizer is None else quantizer.scales
        attach_frozen_layers(denoiser, scales, lambda layer: layer in looked_up, kind, self.dtype)
        if stays:
            attach_host_layers(self.hosted, self.device, self.dtype)
            self._settle(denoiser, blocks)
        return denoiser

    def load_text_encoders(self, for_cache: bool = False) -> list[nn.Module]:
        """The text encoders; in float8 if --fp8_base says so and not --fp8_base_unet.

        Those that fill a cache and go are not rounded: a cache is worth the exact answers.
        """
        encoders = self._arch.load_text_encoders(self.dtype, self.device)
        if self._precision.fp8_base and not self._precision.fp8_base_unet and not for_cache:
            layers = self._arch.quantized_in_encoders
            for encoder in encoders:
                round_weights(encoder, Quantizer(Format(Scaling.NONE), layers.targets, layers.excluded))
                attach_frozen_layers(encoder, dtype=self.dtype)
        return encoders

    def attach(self, models: Models, trained: Trained) -> None:
        """Compile the blocks, decide what each keeps for backward, and divide them among the processes."""
        blocks = self._arch.blocks(models.denoiser)
        uncompiled = [block.forward for block in blocks]
        if self._flags.torch_compile and self.device != META:
            compile_blocks(blocks, self._flags.dynamo_backend)
        encoder_blocks = [
            block
            for encoder in (models.text_encoders if trained.trains_text_encoder else ())
            for block in self._arch.encoder_blocks(encoder)
        ]
        if self._flags.activation_memory is not None:
            self._plan(blocks, uncompiled)
            checkpoint_blocks(encoder_blocks)
        elif self._flags.gradient_checkpointing:
            checkpoint_blocks([*blocks, *encoder_blocks], Recompute.ALL, self._offload())
        elif self._flags.torch_compile and self.streamed:
            logger.info("swapped blocks are recomputed: a compiled block cannot look its weights up again")
            checkpoint_blocks([blocks[index] for index in self.streamed])
        if self.sharding is not None and self.device != META:
            self._divide(models.denoiser, blocks, self.sharding)

    @property
    def plans(self) -> bool:
        """Whether the second step differs from the first, which only measures."""
        return self._flags.activation_memory is not None

    def after_update(self) -> None:
        """Called after each step of the optimizer: from the first one on, all that stays in memory is there."""
        self._updates += 1
        if self._updates == 1 and self._swap == AUTO and self.streams is not None:
            self._keep_what_fits(self.streams)

    def bytes_away(self, denoiser: nn.Module) -> int:
        """What of the weights of a denoiser without content would not lie on the device, buffers counted as there."""
        blocks = self._arch.blocks(denoiser)
        if self.sharding is not None:
            return weight_bytes(denoiser) - bytes_at_once(
                denoiser,
                blocks,
                self.ranks,
                frees_after_forward=self.sharding.frees_after_forward,
                in_main_memory=self.sharding.waits_in_main_memory,
            )
        sizes = [streamed_bytes(blocks[index]) for index in self.streamed]
        streamed = max(sum(sizes) - BUFFERS * max(sizes, default=0), 0)
        return streamed + sum(layer.weight.nbytes for layer in self.hosted)

    def said_to_be_away(self) -> str:
        """Which weights these are."""
        if self.sharding is not None:
            whole = f"{WHOLE_AT_ONCE} blocks are whole at once"
            return f"divided among {self.ranks} processes; {whole if self.sharding.frees_after_forward else KEPT_WHOLE}"
        blocks = f"{len(self.streamed)} blocks lie in main memory and have {BUFFERS} buffers here"
        layers = f"{len(self.hosted)} layers are calculated in main memory"
        return ", ".join(text for text, there in ((blocks, self.streamed), (layers, self.hosted)) if there)

    def _quantizer(self) -> Quantizer | None:
        layers = self._arch.quantized
        if self._scaled and layers is not None:
            scaling = Scaling.CHANNEL if self._multiplies else Scaling.BLOCK
            return Quantizer(Format(scaling), layers.targets, layers.excluded, self._rounding_place())
        if self._precision.fp8_base or self._precision.fp8_base_unet:
            return Quantizer(Format(Scaling.NONE), place=self._rounding_place())
        return None

    def _rounding_place(self) -> torch.device | None:
        return None if self.device == META else self.device

    def _blocks_to_stream(self, denoiser: nn.Module, blocks: list[nn.Module]) -> list[int]:
        if not self._swap:
            return []
        if self._swap == AUTO:
            groups = most_swapped(functools.partial(self._arch.swap_groups, denoiser), len(blocks))
        else:
            groups = self._arch.swap_groups(denoiser, int(self._swap))
        places = {id(block): index for index, block in enumerate(blocks)}
        chosen = [group.blocks[i] for group in groups for i in spread_evenly(len(group.blocks), group.num_swapped)]
        return sorted(places[id(block)] for block in chosen)

    def _settle(self, denoiser: nn.Module, blocks: list[nn.Module]) -> None:
        """Bring what does not stay in main memory to the device, and arrange for what does."""
        away = {(id(layer._parameters), "weight") for layer in self.hosted}
        if self.hosted:
            size = sum(layer.weight.nbytes for layer in self.hosted)
            logger.info(
                "%d layers lie in main memory (%.2f GB) and are calculated there", len(self.hosted), size / GIGABYTE
            )
        if self.streamed:
            self.streams = BlockSwap(blocks, self.streamed, make_copier(self.device))
            away |= self.streams.away()
            size = sum(self.streams.sizes().values())
            logger.info(
                "%d of %d blocks lie in main memory (%.2f GB) and come to the device in turn, into %.2f GB of buffers",
                *(len(self.streamed), len(blocks), size / GIGABYTE, self.streams.buffer_bytes() / GIGABYTE),
            )
        settle(denoiser, self.device, away)

    def _divide(self, denoiser: nn.Module, blocks: list[nn.Module], sharding: Sharding) -> None:
        everything = weight_bytes(denoiser)
        part = divide(
            denoiser,
            blocks,
            self.device,
            apart=self._arch.vector_layers(denoiser),
            frees_after_forward=sharding.frees_after_forward,
            waits_in_main_memory=sharding.waits_in_main_memory,
            fetches_ahead=sharding.fetches_ahead,
        )
        logger.info(
            "FSDP: of %.2f GB of frozen weights of the denoiser this process keeps %.2f GB%s; blocks are %s",
            *(everything / GIGABYTE, part / GIGABYTE),
            " in main memory" if sharding.waits_in_main_memory else "",
            "whole in their turn" if sharding.frees_after_forward else KEPT_WHOLE,
        )

    def _keep_what_fits(self, streams: BlockSwap) -> None:
        """--blocks_to_swap auto: what the first step has left free is for weights that stay, or for activations."""
        if self._flags.activation_memory == AUTO:
            return
        kept = streams.keep_what_fits(self._free())
        logger.info(
            "--blocks_to_swap auto: %d blocks stay on the device now, %d are still swapped", kept, len(streams.order)
        )

    def _plan(self, blocks: list[nn.Module], measured: Sequence[Callable[..., Any]]) -> None:
        """Let a plan decide at each call; a compiled block would not be compiled any more once it has been measured."""
        streamed = set(self.streamed) if self._flags.torch_compile else set()
        allowed = [frozenset([Recompute.ALL]) if i in streamed else frozenset(Recompute) for i in range(len(blocks))]
        plan = ActivationPlan(measured, self._budget, allowed)
        offload = self._offload()
        for index, block in enumerate(blocks):
            block.forward = Checkpointed(block, functools.partial(plan.choose, index), offload)
        self.plan = plan

    def _budget(self, needed: int) -> int | None:
        """Bytes for activations, of which `needed` are in use at any rate; None as long as it cannot be known."""
        size = self._flags.activation_memory
        if size is not None and size != AUTO:
            return int(float(size) * GIGABYTE)
        return needed + self._free() if self._updates else None

    def _free(self) -> int:
        """Bytes of the device that nothing has needed yet; all that is free where there is no GPU."""
        if self.device.type != "cuda":
            return 1 << 62
        taken = torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_allocated(self.device)
        return never_needed(*torch.cuda.mem_get_info(self.device), *taken)

    def _offload(self) -> InputOffload | None:
        if not self._flags.cpu_offload_checkpointing:
            return None
        copier: Copier = ElsewhereCopier() if self.device == META else make_copier(self.device)
        return InputOffload(copier)


def never_needed(free: int, total: int, reserved: int, peak: int) -> int:
    """Bytes of a device with `total` that automatic choices may take.

    They are what is `free` and what torch has `reserved` beyond the `peak` of what was in use, less a margin.
    """
    return max(int(free + reserved - peak - MARGIN * total), 0)


def most_swapped(groups_of: Callable[[int], Sequence[SwapGroup]], blocks: int) -> Sequence[SwapGroup]:
    """The groups with as many swapped blocks as the model can do without."""
    for number in range(blocks, 1, -1):
        try:
            return groups_of(number)
        except ValueError:
            continue
    return groups_of(1)
