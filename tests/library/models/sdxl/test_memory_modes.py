"""What saves memory changes nothing that a small U-Net of Stable Diffusion XL with LoRA answers and learns."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from library.flags.run import LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.memory.checkpointing import Recompute
from library.memory.input_offload import InputOffload
from library.models.architecture import OnWeight
from library.models.sdxl.architecture import Sdxl
from library.models.sdxl.unet import SdxlUNet, UNetShape
from library.train.memory import MemoryRoom
from library.train.state import Models
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter
from tests.library.memory.toys import LateCopier

CPU = torch.device("cpu")
SHAPE = UNetShape(
    widths=(32, 64), depths=(0, 1), mid_depth=1, layers_per_level=1, context_dim=16, vector_dim=24, time_dim=32
)


class SmallSdxl(Sdxl):
    """Its U-Net comes from no file."""

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, on_weight: OnWeight | None = None) -> nn.Module:
        torch.manual_seed(0)
        unet = SdxlUNet(SHAPE).requires_grad_(False).to(dtype)
        for name, parameter in list(unet.named_parameters()):
            if on_weight is not None:
                parent, _, leaf = name.rpartition(".")
                rounded = nn.Parameter(on_weight(name, parameter.detach()), requires_grad=False)
                unet.get_submodule(parent)._parameters[leaf] = rounded
        return unet


class NoText:
    """What is trained: of the U-Net alone."""

    trains_text_encoder = False


def room_of(*flags: Any) -> MemoryRoom:
    settings = Settings.of(*flags)
    return MemoryRoom(settings, SmallSdxl(settings), torch.float32, CPU)


def adapt(unet: nn.Module) -> nn.ModuleList:
    """LoRA on every linear layer and convolution of the blocks."""
    torch.manual_seed(1)
    adapters = []
    for path, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and "_block" in path:
            adapters.append(LoraAdapter(layer, 2, 2.0, Dropout(neuron=0.2), Strength()))
            nn.init.normal_(adapters[-1].lora_up.weight, std=0.1)
            parent, _, name = path.rpartition(".")
            stand_in(unet.get_submodule(parent), name, adapters[-1])
    return nn.ModuleList(adapters).train()


def learnt(room: MemoryRoom, unet: nn.Module) -> list[Tensor]:
    """Answers and gradients of two steps, and the answer without a graph between them."""
    adapters = adapt(unet)
    trained: Any = NoText()
    room.attach(Models([], unet), trained)
    found = []
    for step in range(2):
        torch.manual_seed(step)
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([500 + step]), torch.randn(1, 5, 16), torch.randn(1, 24)
        adapters.zero_grad()
        out = unet(*inputs)
        out.square().sum().backward()
        room.after_update()
        found += [out.detach(), *(p.grad.clone() for p in adapters.parameters() if p.grad is not None)]
        with torch.no_grad():
            found.append(unet(*inputs))
    assert len(found) > 2 * len(adapters)
    return found


def alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    """But for rounding; some gradients are nothing else than that."""
    whole = torch.cat([tensor.flatten() for tensor in expected]).norm()
    pairs = zip(found, expected, strict=True)
    return all((ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6 * whole for ours, theirs in pairs)


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    room = room_of()
    return learnt(room, room.load_denoiser())


@pytest.mark.parametrize(
    "flags", [MemoryFlags(gradient_checkpointing=True), MemoryFlags(activation_memory="0.0008")], ids=["all", "planned"]
)
def test_recomputing_changes_no_bit(plain: list[Tensor], flags: MemoryFlags) -> None:
    room = room_of(flags)
    found = learnt(room, room.load_denoiser())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    if flags.activation_memory is not None:  # the first step measures, and the second follows the plan
        assert room.plan is not None
        (plan,) = room.plan.plans.values()
        assert set(plan.choices) == set(Recompute)


def test_inputs_that_wait_in_main_memory_change_no_bit(plain: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    copier = LateCopier()
    monkeypatch.setattr("library.train.memory.make_copier", lambda device: copier)
    monkeypatch.setattr("library.train.memory.InputOffload", functools.partial(InputOffload, smallest=1))
    room = room_of(MemoryFlags(gradient_checkpointing=True, cpu_offload_checkpointing=True))
    found = learnt(room, room.load_denoiser())
    assert copier.copies and all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


@pytest.mark.parametrize(("flag", "recomputes"), [("fp8_base", True), ("fp8_base_unet", False)])
def test_weights_in_float8_answer_and_learn_as_the_numbers_that_they_stand_for(flag: str, recomputes: bool) -> None:
    widened = room_of()
    unet = widened.load_denoiser()
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1 and name.endswith("weight"):
            parameter.data = parameter.to(torch.float8_e4m3fn).to(torch.float32)
    expected = learnt(widened, unet)
    room = room_of(PrecisionFlags(**{flag: True}), MemoryFlags(gradient_checkpointing=recomputes))
    rounded = room.load_denoiser()
    formats = {p.dtype for name, p in rounded.named_parameters() if p.dim() > 1 and name.endswith("weight")}
    assert formats == {torch.float8_e4m3fn}
    # The sum of layer and adapter is made in another order for a convolution that looks its weight up.
    assert alike(learnt(room, rounded), expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_answer_and_learn_the_same(
    plain: list[Tensor], fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_of(MemoryFlags(torch_compile=True, dynamo_backend="eager", gradient_checkpointing=True))
    unet = room.load_denoiser()
    monkeypatch.setattr(room._arch, "blocks", lambda denoiser: [unet.input_blocks[1]])  # one kind is enough
    assert alike(learnt(room, unet), plain)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_its_blocks_are_not_swapped() -> None:
    with pytest.raises(ValueError, match="--blocks_to_swap is not supported for sdxl"):
        room_of(LargeModelFlags(blocks_to_swap=1)).load_denoiser()
