"""The fused layers give the numbers of the plain formula, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.core.low_rank import low_rank_conv, low_rank_linear, low_rank_onto

CONVS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strided 1x1": {"kernel_size": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "oblong": {"kernel_size": (3, 1), "padding": (1, 0)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "grouped 1x1": {"kernel_size": 1, "groups": 2},
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "2-D": lambda: torch.randn(3, 6),
    "3-D": lambda: torch.randn(2, 5, 6),
    "4-D": lambda: torch.randn(2, 3, 4, 6),
    "transposed": lambda: torch.randn(2, 6, 5).transpose(1, 2),
    "sliced": lambda: torch.randn(2, 9, 12)[:, ::2, 3:9],
}


def linear_weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(4, 6), (4,), (2, 6), (4, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def conv_weights(conv: nn.Conv2d, rank: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    dtype = conv.weight.dtype
    down = torch.randn(rank, conv.in_channels, *conv.kernel_size, dtype=dtype, requires_grad=True)
    up = torch.randn(conv.out_channels, rank, 1, 1, dtype=dtype, requires_grad=True)
    return [conv.weight, conv.bias, down, up]


def geometry_of(conv: nn.Conv2d) -> tuple:
    return (conv.stride, conv.padding, conv.dilation, conv.groups)


def naive_linear(x, weight, bias, down, up, factor, rank_scale=None):
    h = F.linear(x, down)
    h = h if rank_scale is None else h * rank_scale
    return F.linear(x, weight, bias) + F.linear(h, up) * factor


def naive_conv(x, weight, bias, down, up, geometry, factor, rank_scale=None):
    stride, padding, dilation, _ = geometry
    h = F.conv2d(x, down, None, stride, padding, dilation)
    h = h if rank_scale is None else h * rank_scale
    return F.conv2d(x, weight, bias, *geometry) + F.conv2d(h, up) * factor


def assert_same_numbers(ours: Tensor, theirs: Tensor, leaves: list[Tensor], rtol: float = 1e-6) -> None:
    torch.manual_seed(2)
    dy = torch.randn_like(theirs)
    assert_close(ours, theirs, rtol)
    for mine, other in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True):
        assert_close(mine, other, rtol)


def assert_close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max().item() <= rtol * max(theirs.abs().max().item(), 1.0)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_the_formula_in_output_and_all_gradients(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    x = INPUTS[name]().requires_grad_()
    weight, b, down, up = linear_weights()
    leaves = [x, weight, down, up, *([b] if bias else [])]
    arguments = (x, weight, b if bias else None, down, up, 0.3)
    assert_same_numbers(low_rank_linear(*arguments), naive_linear(*arguments), leaves)


@pytest.mark.parametrize("shape", [(2, 1, 2), (2, 5, 2), (2, 1, 1)])
def test_a_linear_layer_scales_its_ranks(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, requires_grad=True)
    weight, bias, down, up = linear_weights()
    arguments = (x, weight, bias, down, up, 0.3, torch.rand(shape))
    assert_same_numbers(low_rank_linear(*arguments), naive_linear(*arguments), [x, weight, bias, down, up])


@pytest.mark.parametrize("name", INPUTS)
def test_adding_onto_an_answer_equals_the_formula(name: str) -> None:
    torch.manual_seed(0)
    x = INPUTS[name]().requires_grad_()
    weight, bias, down, up = linear_weights()
    ours = low_rank_onto(F.linear(x, weight, bias), x, down, up, 0.3)
    assert_same_numbers(ours, naive_linear(x, weight, bias, down, up, 0.3), [x, weight, bias, down, up])
    viewed = low_rank_onto(F.linear(x, weight, bias)[..., :], x, down, up, 0.3)
    assert_close(viewed, ours, 1e-6)


# torch 2.13 itself corrupts memory in the weight gradient of a strided 1x1 convolution of a channels-last input.
CASES = [(name, layout) for name in CONVS for layout in (torch.contiguous_format, torch.channels_last)]
CASES.remove(("strided 1x1", torch.channels_last))


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_convolution_equals_the_formula_in_output_and_all_gradients(
    name: str, layout: torch.memory_format, masked: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, **CONVS[name])
    x = torch.randn(3, 6, 8, 10).to(memory_format=layout).requires_grad_()
    rank_scale = torch.rand(3, 2, 1, 1) if masked else None
    weights = conv_weights(conv)
    arguments = (x, *weights, geometry_of(conv), 0.3, rank_scale)
    assert_same_numbers(low_rank_conv(*arguments), naive_conv(*arguments), [x, *weights], rtol=3e-6)
    conv.requires_grad_(False)  # another way through backward
    trained = [x, *weights[2:]]
    assert_same_numbers(low_rank_conv(*arguments), naive_conv(*arguments), trained, rtol=3e-6)


def test_a_sliced_image_goes_through_a_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 1).requires_grad_(False)
    x = torch.randn(2, 6, 8, 10)[:, :, ::2, 1:9].requires_grad_()
    weights = conv_weights(conv)
    arguments = (x, *weights, geometry_of(conv), 0.3)
    assert_same_numbers(low_rank_conv(*arguments), naive_conv(*arguments), [x, *weights[2:]], rtol=3e-6)


def test_gradients_are_right_in_double_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    leaves = linear_weights(torch.double)
    scale = torch.rand(2, 1, 2, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x, *w: low_rank_linear(x, *w, 0.3, scale), (x, *leaves))
    image = torch.randn(2, 4, 5, 6, dtype=torch.double, requires_grad=True)
    for kind in ("1x1", "strided"):
        conv = nn.Conv2d(4, 3, **CONVS[kind]).double()
        geometry = geometry_of(conv)
        inputs = (image, *conv_weights(conv))
        assert torch.autograd.gradcheck(lambda x, *w, g=geometry: low_rank_conv(x, *w, g, 0.3), inputs)


def test_nothing_is_computed_for_an_input_that_needs_no_gradient() -> None:
    weight, bias, down, up = linear_weights()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    x = torch.randn(2, 5, 6)
    y = low_rank_linear(x, weight, bias, down, up, 0.3)
    with counted("aten::mm", "aten::addmm") as calls:
        y.sum().backward()
    assert calls() == 3  # up's gradient, down's, and dy @ up between them
    x.requires_grad_()
    y = low_rank_linear(x, weight, bias, down, up, 0.3)
    with counted("aten::mm", "aten::addmm", "aten::addmm_") as calls:
        y.sum().backward()
    assert calls() == 5


def test_a_layer_makes_no_elementwise_pass() -> None:
    weight, bias, down, up = linear_weights()
    x = torch.randn(2, 5, 6, requires_grad=True)
    with counted("aten::mul", "aten::mul_", "aten::add", "aten::add_") as calls:
        low_rank_linear(x, weight, bias, down, up, 0.3).sum().backward()
    assert calls() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_and_gradients_come_back_in_full(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, requires_grad=True)
    leaves = linear_weights()
    with torch.autocast("cpu", dtype):
        ours, theirs = low_rank_linear(x, *leaves, 0.3), naive_linear(x, *leaves, 0.3)
    assert ours.dtype == dtype
    for gradient in torch.autograd.grad(ours.sum(), [x, *leaves], retain_graph=True):
        assert gradient.dtype == torch.float32
    assert_same_numbers(ours, theirs, [x, *leaves], rtol=2e-2)
    conv = nn.Conv2d(6, 4, 3, padding=1)
    image = torch.randn(2, 6, 8, 8, requires_grad=True)
    weights = conv_weights(conv)
    with torch.autocast("cpu", dtype):
        ours = low_rank_conv(image, *weights, geometry_of(conv), 0.3)
        theirs = naive_conv(image, *weights, geometry_of(conv), 0.3)
    assert_same_numbers(ours, theirs, [image, *weights], rtol=2e-2)


def test_a_half_precision_model_takes_full_precision_adapters() -> None:
    weight, bias, down, up = linear_weights()
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    y = low_rank_linear(x, weight.detach().bfloat16(), bias.detach().bfloat16(), down, up, 0.3)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert down.grad.dtype == torch.float32


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    leaves = linear_weights()
    plain = torch.autograd.grad(low_rank_linear(x, *leaves, 0.3).square().sum(), leaves)
    again = checkpoint(lambda x: low_rank_linear(x, *leaves, 0.3).square().sum(), x, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again, leaves), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    y = low_rank_linear(x, *linear_weights(), 0.3)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_answer_may_be_changed_in_place() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    leaves = linear_weights()
    y = low_rank_linear(x, *leaves, 0.3)
    y += 1.0
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


class counted:
    """Counts calls of operators while the context lasts."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def __enter__(self) -> Callable[[], int]:
        self.profile.__enter__()
        return lambda: sum(event.count for event in self.profile.key_averages() if event.key in self.names)

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(*error)
