"""Are kernels, bytes, FLOPs and scalar reads counted as they are?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from step_counts import AutocastOfGpus, OperationCounter, count_step, make_fake, touched_bytes


def test_views_are_free_and_kernels_are_counted_by_name() -> None:
    x = torch.ones(4, 6)
    with OperationCounter() as counter:
        y = x.t().reshape(2, 12)[:, 3:]
        (y * 2 + 1).sum()
    assert dict(counter.kernels) == {"aten.clone": 1, "aten.mul": 1, "aten.add": 1, "aten.sum": 1}
    # clone: 24 read, 24 written; mul and add: 18 read, 18 written each; sum: 18 read, 1 written
    assert counter.elementwise_bytes == 4 * (24 + 24 + 2 * (18 + 18) + 18 + 1)
    assert counter.flops == 0


def test_products_count_as_operations_and_not_as_traffic() -> None:
    x, weight, bias = torch.ones(5, 8), torch.ones(8, 3), torch.ones(3)
    with OperationCounter() as counter:
        y = torch.addmm(bias, x, weight)
        y.addmm_(x, weight)
    assert dict(counter.kernels) == {"aten.addmm": 1, "aten.addmm_": 1}
    assert counter.flops == 2 * (2 * 5 * 8 * 3)
    assert counter.elementwise_bytes == 0


def test_norms_are_widened_as_a_gpu_does() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with AutocastOfGpus():
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert F.layer_norm(x, (8,)).dtype == torch.float32
            assert F.group_norm(x, 2, torch.ones(8)).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert F.layer_norm(x, (8,)).dtype == torch.bfloat16


def test_a_scalar_that_is_read_is_seen() -> None:
    x = torch.ones(3)
    with OperationCounter() as counter:
        x.sum().item()
        bool(x[0] > 0)
    assert counter.scalar_reads == 2


def test_expanded_tensors_cost_what_they_hold() -> None:
    assert touched_bytes(torch.ones(3, 1).expand(3, 100)) == 12
    assert touched_bytes(torch.ones(0)) == 0


def test_what_is_kept_for_backward_counts_once_and_weights_do_not() -> None:
    weight, x = nn.Parameter(torch.ones(8, 8)), torch.ones(5, 8)

    def loss() -> Tensor:
        hidden = (x @ weight).relu()
        return (hidden * hidden).sum()

    # the output of relu, which the product keeps twice more, and the loss itself
    assert count_step(loss)["bytes_kept_for_backward"] == 5 * 8 * 4 + 4


def test_a_step_on_fake_tensors_counts_like_a_real_one() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

    def loss_of(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().mean()

    real = model()
    expected = count_step(lambda: loss_of(real, torch.ones(5, 8)))
    fake, mode = model(), FakeTensorMode()
    make_fake([fake], mode)
    with mode:
        counted = count_step(lambda: loss_of(fake, torch.ones(5, 8)))
    assert counted == expected
    # forward 2 * 5 * (8 * 16 + 16 * 4); backward the same for both weights, and 16 * 4 for the hidden gradient
    assert counted["flops"] == 2 * 5 * (8 * 16 + 16 * 4) * 2 + 2 * 5 * 16 * 4
