"""A layer with an adapter stands in for the layer it adapts and changes nothing else about the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import AdaptedConv2d, AdaptedLinear, LoraAdapter


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)).requires_grad_(False)


def adapt(parent: nn.Module, attribute: str, rank: int = 2, dropout: Dropout | None = None) -> LoraAdapter:
    adapter = LoraAdapter(getattr(parent, attribute), rank, 1.0, dropout or Dropout(), Strength())
    nn.init.normal_(adapter.lora_up.weight)
    stand_in(parent, attribute, adapter)
    return adapter


def test_state_dict_and_classes_of_the_model_are_unchanged() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight = model[0].weight
    adapt(model, "0")
    adapt(model, "2")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight is weight
    assert len(list(model.parameters())) == 3
    conv = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    adapt(conv, "conv")
    assert type(conv["conv"]) is AdaptedConv2d


def test_an_adapter_starts_without_effect_and_with_torchs_usual_spread() -> None:
    torch.manual_seed(0)
    adapter = LoraAdapter(nn.Linear(300, 7), 4, 2.0, Dropout(), Strength())
    assert torch.equal(adapter.lora_up.weight, torch.zeros(7, 4))
    bound = 300**-0.5  # kaiming uniform with a = sqrt(5)
    assert bound * 0.9 < adapter.lora_down.weight.abs().max().item() <= bound
    assert adapter.lora_down.weight.dtype == torch.float32
    assert (adapter.scale, adapter.alpha.item()) == (0.5, 2.0)


def test_a_layer_with_its_own_forward_keeps_it() -> None:
    model = small_model()
    base = model[0]
    base.forward = lambda x: torch.full((*x.shape[:-1], 8), 10.0)
    adapter = adapt(model, "0")
    x = torch.randn(3, 6)
    expected = 10.0 + x @ adapter.lora_down.weight.T @ adapter.lora_up.weight.T * 0.5
    assert torch.allclose(model[0](x), expected, atol=1e-5)
    conv = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, padding=1)})
    conv["conv"].forward = lambda x: torch.full((len(x), 4, *x.shape[2:]), 10.0)
    adapter = adapt(conv, "conv")
    image = torch.randn(2, 3, 5, 5)
    expected = 10.0 + 0.5 * adapter.lora_up(adapter.lora_down(image))
    assert torch.allclose(conv["conv"](image), expected, atol=1e-5)


def test_two_adapters_on_one_layer_add_up() -> None:
    model = small_model()
    x = torch.randn(3, 6)
    plain = model[0](x)
    first = adapt(model, "0")
    with_first = model[0](x)
    second = adapt(model, "0", rank=3)
    both = model[0](x)
    assert torch.allclose(both - with_first, second.lora_up(second.lora_down(x)) / 3, atol=1e-5)
    first.strength.enabled = second.strength.enabled = False
    assert torch.equal(model[0](x), plain)


def test_whoever_replaces_the_weight_replaces_it_for_both() -> None:
    model = small_model()
    base = model[0]
    adapt(model, "0")
    model[0].weight = nn.Parameter(torch.ones(8, 6), requires_grad=False)
    assert base.weight is model[0].weight
    model.to(torch.float64)
    assert base.weight.dtype == torch.float64


def test_multipliers_of_samples_act_on_their_samples() -> None:
    model = small_model()
    adapter = adapt(model, "0")
    x = torch.randn(2, 4, 6)
    adapter.strength.enabled = False
    plain = model[0](x)
    adapter.strength.enabled = True
    full = model[0](x)
    adapter.strength.rows = torch.tensor([0.25, 0.0])
    scaled = model[0](x)
    assert torch.allclose(scaled[0] - plain[0], 0.25 * (full[0] - plain[0]), atol=1e-6)
    assert torch.allclose(scaled[1], plain[1], atol=1e-6)
    long = torch.cat([x[:1], x[:1], x[1:], x[1:]])  # two rows of tokens a sample
    assert torch.allclose(model[0](long)[1], scaled[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rank_dropout_drops_ranks_of_samples_and_keeps_the_mean(kind: str) -> None:
    torch.manual_seed(0)
    parent = nn.ModuleDict({"layer": nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(3, 8, 1)})
    adapter = adapt(parent, "layer", 1, dropout=Dropout(rank=0.75))
    x = torch.randn(1, 6).expand(4000, 6) if kind == "linear" else torch.randn(1, 3, 2, 2).expand(4000, 3, 2, 2)
    adapter.eval()
    full = parent["layer"](x)
    adapter.strength.enabled = False
    plain = parent["layer"](x)
    adapter.strength.enabled = True
    adapter.train()
    dropped = parent["layer"](x)
    kept = (dropped - plain).flatten(1).norm(dim=1) > 1e-6
    assert 0.2 < kept.float().mean().item() < 0.3
    assert torch.allclose((dropped - plain)[kept], 4.0 * (full - plain)[kept], atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_zeroes_values_between_down_and_up(kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(3, 8, 3, stride=2, padding=1)
    parent = nn.ModuleDict({"layer": layer})
    adapter = adapt(parent, "layer", rank=1, dropout=Dropout(neuron=0.5))
    x = torch.randn(50, 40, 6) if kind == "linear" else torch.randn(5, 3, 20, 20)
    adapter.strength.enabled = False
    plain = parent["layer"](x)
    adapter.strength.enabled = True
    part = (parent["layer"](x) - plain).abs().sum(-1 if kind == "linear" else 1)
    assert 0.4 < (part < 1e-6).float().mean().item() < 0.6
    adapter.eval()
    assert (parent["layer"](x) - plain).abs().sum(-1 if kind == "linear" else 1).min().item() > 0


def test_dropout_is_the_same_when_checkpointing_computes_a_layer_again() -> None:
    model = small_model()
    adapter = adapt(model, "0", rank=4, dropout=Dropout(neuron=0.5))
    x = torch.randn(2, 3, 6)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        adapter.zero_grad()
        run(x).square().sum().backward()
        gradients.append(adapter.lora_down.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1])


def test_an_adapter_that_is_skipped_or_rests_costs_nothing() -> None:
    model = small_model()
    x = torch.randn(3, 6)
    plain = model[0](x)
    adapter = adapt(model, "0")
    adapter.skipped = True
    assert torch.equal(model[0](x), plain)
    adapter.eval()
    assert not torch.equal(model[0](x), plain)  # pictures are made with all of them
    adapter.resting = True
    assert torch.equal(model[0](x), plain)


def test_compiled_layers_need_no_graph_break_and_give_the_same_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1))
    adapters = [adapt(model, "0"), adapt(model, "3")]
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x).square().sum()
        y.backward()
        results.append([y.detach(), *(adapter.lora_down.weight.grad.clone() for adapter in adapters)])
        for adapter in adapters:
            adapter.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert isinstance(model[0], AdaptedLinear)
