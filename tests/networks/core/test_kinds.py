"""Every kind of adapter computes what a plain dense formula says, with the same gradients, on any layer."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.memory.frozen_layers import attach_frozen_layers
from networks.core.adapter import Adapter, Dropout, Strength, stand_in
from networks.core.key_names import AdapterShape, adapter_shapes
from networks.core.kinds import (
    DyLora,
    Kind,
    LoHa,
    LoKr,
    Lora,
    LoraFa,
    Oft,
    difference_in_file,
    known_args,
    make_adapter,
)
from networks.core.options import NetworkArgs
from networks.core.targets import Target

KINDS: dict[str, tuple[type[Kind], dict[str, str]]] = {
    "lora": (Lora, {}),
    "rslora": (Lora, {"rs_lora": "True"}),
    "pissa": (Lora, {"pissa": "True"}),
    "dora": (Lora, {"dora_wd": "True"}),
    "dora_out": (Lora, {"dora_wd": "True", "wd_on_output": "True"}),
    "lora_fa": (LoraFa, {}),
    "dylora": (DyLora, {"unit": "1"}),
    "loha": (LoHa, {}),
    "loha_tucker": (LoHa, {"use_tucker": "True"}),
    "lokr": (LoKr, {"factor": "2"}),
    "lokr_tucker": (LoKr, {"factor": "2", "use_tucker": "True"}),
    "lokr_whole": (LoKr, {}),
    "oft": (Oft, {"enable_conv": "True"}),
}
LAYERS = {
    "linear": lambda: (nn.Linear(24, 32), (2, 5, 24)),
    "no bias": lambda: (nn.Linear(24, 32, bias=False), (2, 24)),
    "conv": lambda: (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 6)),
    "pointwise": lambda: (nn.Conv2d(24, 32, 1), (2, 24, 3, 4)),
}
every_kind = pytest.mark.parametrize("name", list(KINDS))
every_layer = pytest.mark.parametrize("layer", list(LAYERS))


class Case:
    """A layer with an adapter of random numbers, and the same layer without."""

    def __init__(self, name: str, layer: str, dropout: Dropout | None = None, alpha: float | None = None) -> None:
        torch.manual_seed(0)
        kind_of, values = KINDS[name]
        kind = kind_of(NetworkArgs(values, known_args(kind_of, ()), name))
        base, self.size = LAYERS[layer]()
        self.holder = nn.ModuleDict({"layer": base.requires_grad_(False)})
        self.plain = type(base)(**_arguments(base))
        self.plain.load_state_dict(base.state_dict())
        shape = AdapterShape(2, (1.0 if kind_of is not Oft else 0.05) if alpha is None else alpha)
        self.strength = Strength()
        self.adapter = make_adapter(
            kind, Target("lora_unet_x", self.holder, "layer", shape), dropout or Dropout(), self.strength
        )
        self.start = {key: value.clone() for key, value in self.adapter.file_tensors().items()}
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        stand_in(self.holder, "layer", self.adapter)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.adapter.halves()[0], *self.adapter.halves()[1]]

    def __call__(self, x: Tensor) -> Tensor:
        answer: Tensor = self.holder["layer"](x)
        return answer

    def difference(self) -> Tensor:
        """By the formula for files."""
        tensors = {key: value.detach() for key, value in self.adapter.file_tensors().items()}
        shape = adapter_shapes({f"x.{key}": value for key, value in tensors.items()})["x"]
        return difference_in_file(tensors, shape, self.plain.weight.detach().float())

    def merged(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        return _with_weight(self.plain, x, self.plain.weight.detach() + multiplier * self.difference())


def _arguments(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(layer, name) for name in names}


def _with_weight(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


@every_layer
@every_kind
def test_the_answer_is_that_of_the_merged_weight(name: str, layer: str) -> None:
    case = Case(name, layer)
    x = torch.randn(case.size)
    case.adapter.eval()
    torch.testing.assert_close(case(x), case.merged(x), atol=1e-5, rtol=1e-4)
    case.strength.multiplier = 0.5
    torch.testing.assert_close(case(x), case.merged(x, 0.5), atol=1e-5, rtol=1e-4)


@every_layer
@every_kind
def test_a_new_adapter_changes_nothing(name: str, layer: str) -> None:
    case = Case(name, layer)
    with torch.no_grad():
        case.adapter.load_state_dict(case.start, strict=name != "pissa")
        if name == "pissa":
            case.adapter.lora_down.weight.copy_(case.adapter.twin_down)
            case.adapter.lora_up.weight.copy_(case.adapter.twin_up)
    x = torch.randn(case.size)
    torch.testing.assert_close(case(x), case.plain(x), atol=2e-6, rtol=1e-5)


@every_layer
@pytest.mark.parametrize("name", ["loha", "loha_tucker", "lokr", "lokr_tucker", "lokr_whole", "oft", "pissa"])
def test_gradients_are_those_of_the_dense_formula(name: str, layer: str) -> None:
    case = Case(name, layer)
    x = torch.randn(case.size, requires_grad=True)
    probe = torch.randn_like(case(x))
    ours = torch.autograd.grad((case(x) * probe).sum(), [x, *case.trained])
    copies = {key: value.detach().requires_grad_() for key, value in case.adapter.named_parameters()}
    tensors: dict[str, Tensor] = {**copies, "alpha": case.adapter.alpha}
    if name == "pissa":
        down, up = copies["lora_down.weight"], copies["lora_up.weight"]
        twins = case.adapter.twin_down, -case.adapter.twin_up
        joined = {"lora_down.weight": torch.cat([down, twins[0]]), "lora_up.weight": torch.cat([up, twins[1]], 1)}
        tensors = {**joined, "alpha": 2 * case.adapter.alpha}
    shape = adapter_shapes({f"x.{key}": value for key, value in tensors.items()})["x"]
    weight = case.plain.weight.detach() + difference_in_file(tensors, shape, case.plain.weight.detach())
    theirs = torch.autograd.grad((_with_weight(case.plain, x, weight) * probe).sum(), [x, *copies.values()])
    by_name = dict(zip(copies, theirs[1:], strict=True))
    names = {id(parameter): key for key, parameter in case.adapter.named_parameters()}
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-3)
    for parameter, gradient in zip(case.trained, ours[1:], strict=True):
        torch.testing.assert_close(gradient, by_name[names[id(parameter)]], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("name", ["dora", "dora_out"])
def test_the_gradient_of_dora_takes_the_norm_for_a_constant(name: str, layer: str) -> None:
    case = Case(name, layer)
    x = torch.randn(case.size, requires_grad=True)
    probe = torch.randn_like(case(x))
    ours = torch.autograd.grad((case(x) * probe).sum(), [x, *case.adapter.parameters()])
    copies = {key: value.detach().requires_grad_() for key, value in case.adapter.named_parameters()}
    base = case.plain.weight.detach()
    pair = (copies["lora_up.weight"].flatten(1) @ copies["lora_down.weight"].flatten(1)).reshape(base.shape)
    together = base + case.adapter.scale * pair
    dims = [dim for dim in range(base.dim()) if dim != (0 if name == "dora_out" else 1)]
    weight = together * (copies["dora_scale"] / torch.linalg.vector_norm(together.detach(), dim=dims, keepdim=True))
    theirs = torch.autograd.grad((_with_weight(case.plain, x, weight) * probe).sum(), [x, *copies.values()])
    names = [key for key, _ in case.adapter.named_parameters()]
    for key, mine, other in zip(["x", *names], ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("layer", ["linear", "conv"])
@every_kind
def test_multipliers_of_samples_act_on_their_samples(name: str, layer: str) -> None:
    case = Case(name, layer)
    x = torch.randn(case.size)
    case.adapter.eval()
    full, plain = case(x), case.plain(x)
    case.strength.rows = torch.tensor([0.25, 0.0])
    mixed = case(x)
    torch.testing.assert_close(mixed[0] - plain[0], 0.25 * (full[0] - plain[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@every_kind
def test_weights_in_float8_and_streamed_ones_are_looked_up_again(name: str, layer: str) -> None:
    answers = []
    for handles in (False, True):
        torch.manual_seed(0)
        base, size = LAYERS[layer]()
        holder = nn.ModuleDict({"layer": base.requires_grad_(False)})
        rounded = base.weight.to(torch.float8_e4m3fn)
        base.weight.data = rounded if handles else rounded.float()
        if handles:
            attach_frozen_layers(holder)
        kind_of, values = KINDS[name]
        kind = kind_of(NetworkArgs(values, known_args(kind_of, ()), name))
        torch.manual_seed(1)
        shape = AdapterShape(2, 0.05 if kind_of is Oft else 1.0)
        adapter = make_adapter(kind, Target("x", holder, "layer", shape), Dropout(), Strength())
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
        adapter.eval()
        stand_in(holder, "layer", adapter)
        x = torch.randn(size, generator=torch.Generator().manual_seed(2), requires_grad=True)
        y = holder["layer"](x)
        y.square().sum().backward()
        answers.append([y, x.grad, *(p.grad for part in adapter.halves() for p in part)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2 if "dora" in name else 1e-4)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@every_kind
def test_mixed_precision_computes_in_sixteen_bits_with_gradients_in_full(name: str, layer: str) -> None:
    case = Case(name, layer)
    case.adapter.eval()
    x = torch.randn(case.size)
    exact = case(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = case(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in case.trained)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "pissa"])
def test_dropout_is_the_same_when_checkpointing_computes_a_layer_again(name: str, layer: str) -> None:
    case = Case(name, layer, Dropout(neuron=0.3, rank=0.3))
    case.adapter.start_step(random.Random(0))
    x = torch.randn(case.size)
    found = []
    for run in (case, lambda x: checkpoint(case, x, use_reentrant=False)):
        torch.manual_seed(3)
        case.adapter.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(parameter.grad.clone() for parameter in case.trained)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    case.adapter.eval()
    assert not torch.equal(case(x), found[0][0])


@every_kind
def test_a_second_adapter_on_the_same_layer_adds_up(name: str) -> None:
    case = Case(name, "linear")
    case.adapter.eval()
    x = torch.randn(case.size)
    alone, plain = case(x), case.plain(x)
    second = Lora(NetworkArgs({}, (), "")).make(
        Target("y", case.holder, "layer", AdapterShape(3, 3.0)), Dropout(), Strength()
    )
    nn.init.normal_(second.lora_up.weight)
    stand_in(case.holder, "layer", second)
    lora = x @ second.lora_down.weight.T @ second.lora_up.weight.T
    torch.testing.assert_close(case(x), alone + lora, atol=1e-4, rtol=1e-4)
    second.strength.enabled = case.strength.enabled = False
    torch.testing.assert_close(case(x), plain)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@every_kind
def test_what_a_file_holds_makes_the_same_adapter_again(name: str, layer: str) -> None:
    case = Case(name, layer)
    tensors = {f"x.{key}": value.detach().clone() for key, value in case.adapter.file_tensors().items()}
    shape = adapter_shapes(tensors)["x"]
    again = nn.ModuleDict({"layer": type(case.plain)(**_arguments(case.plain))})
    again["layer"].load_state_dict(case.plain.state_dict())
    again.requires_grad_(False)
    adapter = make_adapter(Lora(NetworkArgs({}, (), "")), Target("x", again, "layer", shape), Dropout(), Strength())
    adapter.load_state_dict({key.removeprefix("x."): value for key, value in tensors.items()})
    stand_in(again, "layer", adapter)
    adapter.eval()
    case.adapter.eval()
    x = torch.randn(case.size)
    torch.testing.assert_close(again["layer"](x), case(x), atol=1e-5, rtol=1e-4)


@every_kind
def test_shrinking_makes_the_norm_the_greatest_allowed(name: str) -> None:
    case = Case(name, "conv")
    norm = case.adapter.norm()
    if name in ("oft", "pissa"):
        assert norm is None
        return
    if not name.startswith("dora"):
        assert norm.item() == pytest.approx(case.difference().norm().item(), rel=1e-4)
    parameters, factors = case.adapter.shrinking()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5 ** (1 / factors))
    assert case.adapter.norm().item() == pytest.approx(norm.item() / 2, rel=1e-4)


def test_the_principal_part_is_that_of_the_singular_value_decomposition() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 50)
    for rounds in ("0", "6"):
        kind = Lora(NetworkArgs({"pissa": "True", "pissa_niter": rounds}, known_args(Lora, ()), ""))
        holder = nn.ModuleDict({"layer": layer})
        state = torch.get_rng_state()
        adapter = kind.make(Target("x", holder, "layer", AdapterShape(4, 2.0)), Dropout(), Strength())
        assert not torch.equal(torch.get_rng_state(), state)  # of the plain start, which is drawn as always
        u, s, v = torch.linalg.svd(layer.weight.detach())
        best = (u[:, :4] * s[:4]) @ v[:4]
        product = adapter.scale * adapter.lora_up.weight @ adapter.lora_down.weight
        error = (product - best).norm() / best.norm()
        assert error < (1e-5 if rounds == "0" else 0.1)
        again = kind.make(Target("x", holder, "layer", AdapterShape(4, 2.0)), Dropout(), Strength())
        assert torch.equal(again.lora_up.weight, adapter.lora_up.weight)


def test_one_unit_of_ranks_learns_at_a_time() -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": nn.Linear(6, 8).requires_grad_(False)})
    kind = DyLora(NetworkArgs({"unit": "2"}, known_args(DyLora, ()), ""))
    adapter = kind.make(Target("x", holder, "layer", AdapterShape(6, 3.0)), Dropout(), Strength())
    nn.init.normal_(adapter.lora_up.weight)
    stand_in(holder, "layer", adapter)
    x = torch.randn(3, 6)
    product = x @ adapter.lora_down.weight.T @ adapter.lora_up.weight.T
    plain = holder["layer"](x) - 0.5 * product
    drawn, rng = set(), random.Random(1)
    for _ in range(30):
        adapter.start_step(rng)
        start = adapter.unit_start
        drawn.add(start)
        adapter.zero_grad()
        y = holder["layer"](x)
        torch.testing.assert_close(y - plain, 0.5 * math.sqrt(6 / (start + 2)) * product, atol=1e-5, rtol=1e-4)
        y.square().sum().backward()
        rows = adapter.lora_down.weight.grad.abs().sum(1) > 0
        assert rows.tolist() == [start <= rank < start + 2 for rank in range(6)]
        assert torch.equal(adapter.lora_up.weight.grad.abs().sum(0) > 0, rows)
    assert drawn == {0, 2, 4}
    adapter.eval()
    torch.testing.assert_close(holder["layer"](x) - plain, 0.5 * product, atol=1e-5, rtol=1e-4)


def test_only_the_second_matrix_of_lora_fa_learns() -> None:
    case = Case("lora_fa", "linear")
    slow, fast = case.adapter.halves()
    assert slow == []
    assert fast[0] is case.adapter.lora_up.weight
    torch.manual_seed(0)
    wide = LoraFa(NetworkArgs({}, (), "")).make(
        Target("x", nn.ModuleDict({"layer": nn.Linear(900, 8)}), "layer", AdapterShape(4, 1.0)), Dropout(), Strength()
    )
    assert wide.lora_down.weight.std().item() == pytest.approx(math.sqrt(2 / 904), rel=0.05)


def test_rank_stabilised_scale_is_saved_as_the_alpha_that_means_it() -> None:
    case = Case("rslora", "linear", alpha=3.0)
    assert case.adapter.scale == pytest.approx(3.0 / math.sqrt(2))
    assert case.adapter.alpha.item() == pytest.approx(3.0 * math.sqrt(2))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Lora, {"dora": "True"}, "did you mean 'dora_wd'"),
        (Lora, {"wd_on_output": "True"}, "wd_on_output needs dora_wd"),
        (Lora, {"pissa_niter": "4"}, "pissa_niter needs pissa"),
        (Lora, {"pissa": "True", "dora_wd": "True"}, "does not go with"),
        (LoKr, {"factor": "0"}, "factor=0"),
        (LoKr, {"factors": "4"}, "did you mean 'factor'"),
        (LoHa, {"unit": "4"}, "does not know 'unit'"),
        (DyLora, {"unit": "0"}, "less than 1"),
        (Oft, {"loraplus_lr_ratio": "4"}, "does not know"),
        (Oft, {"enable_convs": "True"}, "did you mean 'enable_conv'"),
    ],
)
def test_wrong_arguments_are_named(kind: type[Kind], values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(NetworkArgs(values, known_args(kind, ()), kind.name))


@pytest.mark.parametrize(
    ("name", "rank", "dropout", "message"),
    [
        ("oft", 7, Dropout(), "number of blocks"),
        ("pissa", 2, Dropout(rank=0.1), "module_dropout does"),
        ("pissa", 30, Dropout(), "more than a weight"),
    ],
)
def test_what_does_not_fit_the_layer_is_named(name: str, rank: int, dropout: Dropout, message: str) -> None:
    kind_of, values = KINDS[name]
    kind = kind_of(NetworkArgs(values, known_args(kind_of, ()), name))
    holder = nn.ModuleDict({"layer": nn.Linear(24, 32)})
    with pytest.raises(ValueError, match=message):
        make_adapter(kind, Target("x", holder, "layer", AdapterShape(rank, 1.0)), dropout, Strength())


def test_every_kind_can_be_made_on_the_meta_device() -> None:
    for name, (kind_of, values) in KINDS.items():
        with torch.device("meta"):
            holder = nn.ModuleDict({"layer": nn.Conv2d(8, 12, 3)})
        kind = kind_of(NetworkArgs(values, known_args(kind_of, ()), name))
        adapter: Adapter = make_adapter(kind, Target("x", holder, "layer", AdapterShape(2, 1.0)), Dropout(), Strength())
        assert all(tensor.device.type == "cpu" for tensor in adapter.file_tensors().values())
