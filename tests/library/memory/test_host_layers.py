from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import settle
from library.memory.fp8 import Format, Quantizer, Scaling
from library.memory.frozen_layers import attach_frozen_layers, round_weights
from library.memory.host_layers import HostLinear, LastVector, attach_host_layers
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.decomposed import DoraAdapter
from networks.core.lora_adapter import LoraAdapter

CPU = torch.device("cpu")


class Modulated(nn.Module):
    """Two layers that are given the same vector, and what is made of their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 24), nn.Linear(64, 24)

    def forward(self, vector: Tensor) -> Tensor:
        return torch.tanh(self.first(vector)) * self.second(vector)


def made(hosted: bool, scaling: Scaling | None = None) -> Modulated:
    torch.manual_seed(0)
    model = Modulated().requires_grad_(False)
    quantizer = Quantizer(Format(scaling or Scaling.NONE))
    if scaling is not None:
        round_weights(model, quantizer)
    attach_frozen_layers(model, quantizer.scales, lambda layer: True, dtype=torch.float32)
    if hosted:
        attach_host_layers([model.first, model.second], CPU, torch.float32)
    return model


def adapted(model: Modulated) -> nn.ModuleList:
    adapters = []
    for name in ("first", "second"):
        adapters.append(LoraAdapter(getattr(model, name), 4, 4.0, Dropout(neuron=0.3), Strength()))
        nn.init.normal_(adapters[-1].lora_up.weight)
        stand_in(model, name, adapters[-1])
    return nn.ModuleList(adapters).train()


def gradients(model: Modulated, adapters: nn.ModuleList, of_vector: bool) -> list[Tensor | None]:
    torch.manual_seed(1)
    vector = torch.randn(3, 64).requires_grad_(of_vector)
    answer = model(vector)
    answer.square().sum().backward()
    return [answer.detach(), vector.grad, *(parameter.grad for parameter in adapters.parameters())]


@pytest.mark.parametrize("scaling", [None, *Scaling])
@pytest.mark.parametrize("of_vector", [False, True])
def test_answers_and_gradients_are_those_of_the_layer_on_the_device(scaling: Scaling | None, of_vector: bool) -> None:
    theirs, ours = ((model := made(hosted, scaling), adapted(model)) for hosted in (False, True))
    expected, found = gradients(*theirs, of_vector), gradients(*ours, of_vector)
    assert (found[1] is not None) == of_vector and len(found) == 6
    for number, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if mine is not None and other is not None:
            # The gradient of the vector is a sum of those through layers and adapters, added in another order.
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * float(other.abs().max()) if number == 1 else 0)


def test_a_vector_is_fetched_once_for_all_layers_that_are_given_it() -> None:
    last = LastVector()
    vector, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    first = last.of(vector)
    assert last.of(vector) is first and not first.requires_grad
    assert last.of(other) is not first and last.of(vector) is not first


def test_float8_becomes_the_numbers_that_it_stands_for_and_needs_no_scale_any_more() -> None:
    theirs, ours = made(False, Scaling.BLOCK), made(True, Scaling.BLOCK)
    assert ours.first.weight.dtype == torch.float32 and not dict(ours.named_buffers())
    assert torch.equal(ours.first.weight, theirs.first.forward.read(torch.float32))  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_a_gpu_is_sent_the_answers_of_its_own_layers_but_for_rounding() -> None:
    device, found = torch.device("cuda"), []
    for hosted in (False, True):
        torch.manual_seed(0)
        model = Modulated().requires_grad_(False).to(torch.bfloat16)
        layers = [model.first, model.second] if hosted else []
        attach_frozen_layers(model, wanted=lambda layer: True)
        attach_host_layers(layers, device, torch.bfloat16)
        settle(model, device, {(id(layer._parameters), "weight") for layer in layers})
        vector = torch.randn(3, 64).to(device, torch.bfloat16).requires_grad_()
        answer = model(vector)
        answer.float().square().sum().backward()
        assert vector.grad is not None and answer.is_cuda
        found.append(torch.cat([answer.detach().flatten(), vector.grad.flatten()]).float())
    assert (found[0] - found[1]).norm() < 2**-7 * found[0].norm()


def test_a_lora_leaves_the_weight_where_it_is_and_a_kind_that_needs_it_can_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[HostLinear] = []
    read = HostLinear.read
    monkeypatch.setattr(HostLinear, "read", lambda self, dtype: asked.append(self) or read(self, dtype))  # type: ignore[func-returns-value]
    model = made(True)
    gradients(model, adapted(model), of_vector=True)
    assert not asked
    expected, found = (made(hosted) for hosted in (False, True))
    answers = []
    for model in (expected, found):
        torch.manual_seed(2)
        adapter = DoraAdapter(model.first, 2, 2.0, True, Dropout(), Strength())
        nn.init.normal_(adapter.lora_up.weight)
        stand_in(model, "first", adapter)
        answers.append(gradients(model, nn.ModuleList([adapter]), of_vector=True))
    assert asked and all(torch.equal(a, b) for a, b in zip(*answers, strict=True))  # type: ignore[arg-type]
