"""A run of a published model at full size without its files: its weights are made up, everything else is a training.

The model is read by its family from a file that has the published keys and shapes and no content, and stands in memory
with its number format, its adapters, its swapped and recomputed blocks as the flags of a training would have it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn

from demo_checkpoint import Shapes, Sizes, unet_shapes
from demo_flux_weights import FluxSizes, transformer_shapes
from demo_sdxl_weights import SIZE_NUMBERS, SdxlSizes, sdxl_shapes
from header_only import published_shapes, write_hollow_file
from library.data.items import Batch
from library.diffusion.process import Draws
from library.flags.model import ModelFlags
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.run import AttentionFlags, LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.models.architecture import Architecture, OnWeight
from library.models.flux.architecture import Flux
from library.models.sd.architecture import StableDiffusion
from library.models.sdxl.architecture import Sdxl
from library.train.accelerator import make_accelerator
from library.train.memory import MemoryRoom
from library.train.network_trainer import NetworkTrainer
from library.train.state import Models, Plan
from library.train.step import step_loss
from library.train.updates import FlatUpdates

RANK = 16
FORMS = ("bf16", "fp8_base", "fp8_scaled")
META = torch.device("meta")


@dataclass(frozen=True)
class Size:
    """What is trained on what."""

    shapes: Shapes
    """Every weight of the file."""
    side: int
    """Of the picture, in pixels."""
    tokens: int
    """Of its caption."""
    swaps: tuple[int, ...] = (0,)
    """Numbers of swapped blocks that are measured."""


@dataclass(frozen=True)
class Family:
    """A published model, and a small one of its kind on which everything can be tried out."""

    title: str
    architecture: type[Architecture]
    network: str
    text: Callable[[Any, int], dict[str, tuple[int, ...]]]
    """Takes the denoiser and a number of tokens -> the shapes of what the text encoders make of one caption."""
    full: Size
    small: Size
    recompute: tuple[Recompute, ...] = tuple(reversed(Recompute))
    repeated: tuple[str, ...] = ()
    """Lists of blocks that are all alike and make up most of the denoiser."""

    @property
    def forms(self) -> tuple[str, ...]:
        """The number formats that its weights can have."""
        return FORMS if self.architecture.quantized is not None else FORMS[:2]


FAMILIES: Mapping[str, Family] = {
    "sd": Family(
        title="SD 1.5",
        architecture=StableDiffusion,
        network="networks.lora",
        text=lambda unet, tokens: {"context": (tokens, unet.shape.context_dim)},
        full=Size(published_shapes("sd15"), side=512, tokens=77),
        small=Size(unet_shapes(Sizes()), side=32, tokens=8),
    ),
    "sdxl": Family(
        title="SDXL",
        architecture=Sdxl,
        network="networks.lora",
        text=lambda unet, tokens: {
            "hidden_state1": (tokens, unet.shape.context_dim - (pooled := unet.shape.vector_dim - SIZE_NUMBERS)),
            "hidden_state2": (tokens, pooled),
            "pool2": (pooled,),
        },
        full=Size(published_shapes("sdxl_base"), side=1024, tokens=77),
        small=Size(sdxl_shapes(SdxlSizes()), side=32, tokens=8),
    ),
    "flux": Family(
        title="FLUX.1-dev",
        architecture=Flux,
        network="networks.lora_flux",
        text=lambda model, tokens: {"t5_out": (tokens, model.shape.text_dim), "l_pooled": (model.shape.pooled_dim,)},
        full=Size(published_shapes("flux_dev"), side=1024, tokens=512, swaps=(0, 9, 18, 28, 35)),
        small=Size(
            transformer_shapes(FluxSizes(double_blocks=4, single_blocks=6), "dev"), side=32, tokens=8, swaps=(0, 3)
        ),
        recompute=(Recompute.ALL, Recompute.ELEMENTWISE),
        repeated=("double_blocks", "single_blocks"),
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to run."""

    form: str = "bf16"
    blocks_to_swap: int = 0
    recompute: Recompute = Recompute.NOTHING
    compiled: bool = False
    cpu_modulation: bool = False
    backend: str = "inductor"

    def __str__(self) -> str:
        swapped = f", {self.blocks_to_swap} blocks swapped" if self.blocks_to_swap else ""
        hosted = ", --cpu_modulation" if self.cpu_modulation else ""
        return f"{self.form}{swapped}{hosted}, {RECOMPUTED[self.recompute]}{', compiled' if self.compiled else ''}"


RECOMPUTED = {Recompute.NOTHING: "all kept", Recompute.ELEMENTWISE: "products kept", Recompute.ALL: "all recomputed"}


@dataclass(frozen=True)
class MadeUpModel:
    """A denoiser, and what knows it."""

    settings: Settings
    arch: Architecture
    room: MemoryRoom
    denoiser: nn.Module


class MadeUpRun(NetworkTrainer):
    """LoRA of rank 16 on the denoiser, batch size 1, text and latents cached; ready for its first step.

    On the device "meta" nothing has content: for counting.
    """

    def __init__(self, family: Family, size: Size, variant: Variant, device: torch.device) -> None:
        model = made_up_model(family, size, variant, device)
        super().__init__(model.settings)
        self.variant, self.device, self.dtype, self.seed = variant, device, torch.bfloat16, 0
        self.arch, self.room, self.models = model.arch, model.room, Models([], model.denoiser)
        self.trained = self.build_trainable()
        self.groups = self.parameter_groups()
        self.attach()
        self.batch = self.made_up_batch(family.text(model.denoiser, size.tokens), size.side)

    def attach(self) -> None:
        """Compile and recompute as the variant says; the flags know no choice that is the same for all blocks."""
        blocks = self.arch.blocks(self.models.denoiser)
        self.room.attach(self.models, self.trained)
        if self.variant.recompute is Recompute.ELEMENTWISE:
            # A compiled block cannot look its weights up again, so that the room has seen to those that are swapped.
            done = set(self.room.streamed) if self.variant.compiled else set()
            checkpoint_blocks([block for i, block in enumerate(blocks) if i not in done], Recompute.ELEMENTWISE)

    def made_up_batch(self, text: Mapping[str, tuple[int, ...]], side: int) -> Batch:
        """One picture of `side` pixels and its caption, as from a cache."""
        generator = torch.Generator().manual_seed(self.seed)
        size = side // self.arch.latents.stride

        def drawn(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator)

        latents = drawn(self.arch.latents.channels, size, size)
        encoded = {name: drawn(*shape) for name, shape in text.items()}
        return Batch(["made up"], torch.ones(1), latents=latents, text=encoded)

    def loss(self, batch: Batch, seed: int = 0) -> Tensor:
        """The loss of one step, before anything is differentiated."""
        self.trained.start_step(batch, seed)
        return step_loss(batch, self.arch, self.models, self.trained, Draws.seeded(seed, batch.loss_weights.device))

    def prepare_updates(self, steps: int) -> None:
        """The optimizer; not on the device "meta"."""
        with patch_environment(accelerate_use_cpu="true" if self.device.type == "cpu" else "false"):
            self.accelerator = make_accelerator(self.settings)
        self.updates = FlatUpdates(self.settings, self.groups, self.accelerator, Plan.of(steps, 1, steps, None))
        self.batch = self.batch.to(self.device)

    def step(self) -> Tensor:
        """One optimizer step as the trainer does it, without log and files; its loss, on the device."""
        self.state.step += 1
        torch.manual_seed(self.state.step)
        with self.accelerator.autocast():
            loss = self.loss(self.batch, self.state.step)
        self.updates.backward(loss, completes=True)
        self.updates.clip()
        self.updates.step()
        self.room.after_update()
        return loss.detach()


def made_up_model(family: Family, size: Size, variant: Variant, device: torch.device) -> MadeUpModel:
    """The denoiser of a file of this size, as the flags of `variant` let it lie in memory."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "made_up.safetensors"
        write_hollow_file(checkpoint, size.shapes)
        settings = settings_of(family, variant, checkpoint)
        arch = family.architecture(settings)
        room = MemoryRoom(settings, arch, torch.bfloat16, device)
        with made_up_weights(arch, device):
            denoiser = room.load_denoiser()
        arch.base_model_version()  # looked up in the file, which is gone afterwards
    return MadeUpModel(settings, arch, room, denoiser)


def settings_of(family: Family, variant: Variant, checkpoint: Path) -> Settings:
    """What a user would say."""
    return Settings.of(
        ModelFlags(pretrained_model_name_or_path=str(checkpoint)),
        NetworkFlags(network_module=family.network, network_dim=RANK, network_alpha=RANK, network_train_unet_only=True),
        OptimizerFlags(optimizer_type="AdamW", learning_rate=1e-4),
        PrecisionFlags(mixed_precision="bf16", fp8_base=variant.form == "fp8_base"),
        LargeModelFlags(
            blocks_to_swap=variant.blocks_to_swap or None,
            cpu_modulation=variant.cpu_modulation,
            fp8_scaled=variant.form == "fp8_scaled",
        ),
        MemoryFlags(
            gradient_checkpointing=variant.recompute is Recompute.ALL,
            torch_compile=variant.compiled,
            dynamo_backend=variant.backend,
        ),
        AttentionFlags(sdpa=True),
    )


def made_up_weights(arch: Architecture, device: torch.device) -> AbstractContextManager[Any]:
    """While the context lasts each weight that `arch` reads is one that `device` makes up."""
    load = arch.load_denoiser

    def load_denoiser(dtype: torch.dtype, place: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        def made_up(name: str, stored: Tensor) -> Tensor:
            value = torch.empty(stored.shape, dtype=dtype, device=device)
            if value.dim() > 1:
                value.normal_(std=1 / math.sqrt(value[0].numel()))
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            value = value.to(stored.device)
            return value if on_weight is None else on_weight(name, value)

        return load(dtype, place, made_up)

    return patch.object(arch, "load_denoiser", load_denoiser)
