from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.flags.optimizer import OptimizerFlags
from library.train.optimizer import (
    OPTIMIZERS,
    choose_optimizer,
    evaluating,
    is_elementwise,
    make_optimizer,
    optimizer_description,
)

FACTS = json.loads((Path(__file__).parents[2] / "facts/training/optimizers.json").read_text(encoding="utf-8"))
RECORDED = {
    name: path
    for names, (path, _) in FACTS["names"].items()
    for name in names.split(", ")
    if "." in path and " " not in path and not path.startswith("e.g.")
}


def flags(name: str = "", *arguments: str, **others: Any) -> OptimizerFlags:
    return OptimizerFlags(optimizer_type=name, optimizer_args=arguments or None, **others)


def one_group(rows: int = 6) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"params": [nn.Parameter(torch.randn(rows, 4))]}]


def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Gradients that depend on nothing but the step, the same for one tensor as for its parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = sum(p.numel() for p in parameters)
    for step in range(steps):
        values = torch.randn(total, generator=torch.Generator().manual_seed(step)) + 0.3
        for parameter, part in zip(parameters, values.split([p.numel() for p in parameters])):
            parameter.grad = part.reshape(parameter.shape).clone()
        optimizer.step()


def test_the_table_holds_every_recorded_name_and_its_class() -> None:
    assert len(RECORDED) == 23
    assert dict(OPTIMIZERS) == RECORDED


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_name_makes_an_optimizer_that_moves_its_parameters(name: str) -> None:
    groups = one_group()
    optimizer = make_optimizer(flags(name.upper(), learning_rate=1.0), groups)
    before = groups[0]["params"][0].detach().clone()
    train(optimizer, 8)  # RAdamScheduleFree waits five steps
    module, class_name = RECORDED[name].rsplit(".", 1)
    assert type(optimizer).__name__ == class_name
    assert type(optimizer).__module__.split(".")[0] == module.split(".")[0]
    assert not torch.equal(groups[0]["params"][0], before)


def test_no_name_is_adamw_with_the_learning_rate_of_the_flags() -> None:
    optimizer = make_optimizer(flags(learning_rate=3e-4), one_group())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 3e-4


def test_groups_keep_their_own_rate_and_are_not_changed() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [first], "lr": 1e-4}, {"params": [second]}]
    optimizer = make_optimizer(flags("AdamW", learning_rate=5e-4), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 5e-4]
    assert groups == [{"params": [first], "lr": 1e-4}, {"params": [second]}]


def test_arguments_are_python_values_and_pairs_are_tuples() -> None:
    optimizer = make_optimizer(flags("adamw", "betas=0.9,0.99", "weight_decay=1e-2", "amsgrad=True"), one_group())
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.99), 0.01, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("weight_dekay=0.1",), "no argument weight_dekay; did you mean weight_decay"),
        (("betas=fast",), "betas=fast is not a Python value"),
        (("betas",), "expected name=value, got 'betas'"),
        (("betas=0.9=0.99",), "expected name=value"),
        (("lr=0.1",), "lr cannot be given here; use --learning_rate"),
        (("betas=2.0,0.9",), "torch.optim.AdamW refuses --optimizer_args 'betas=2.0,0.9'"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_optimizer(flags("AdamW", *arguments), one_group())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Adam8bits", "torch.optim has no class Adam8bits"),
        ("AdamWW", "did you mean AdamW"),
        ("DAdaptNothing", "torch.optim has no class DAdaptNothing"),
        ("no_such_package.Adam", "pip install no_such_package"),
        ("prodigyplus.ProdigyPlusScheduleFree", "pip install prodigy-plus-schedule-free"),
        ("torch.optim.lr_scheduler.StepLR", "is not an optimizer class"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_way_out(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_optimizer(flags(name), one_group())
    assert message in str(error.value)


def test_other_names_of_torch_and_dotted_paths_are_found_by_their_exact_name() -> None:
    assert type(make_optimizer(flags("NAdam"), one_group())) is torch.optim.NAdam
    assert type(make_optimizer(flags("pytorch_optimizer.CAME"), one_group())).__name__ == "CAME"
    with pytest.raises(ValueError, match="torch.optim has no class nadam"):
        make_optimizer(flags("nadam"), one_group())


def test_sgd_nesterov_has_momentum_unless_another_is_given() -> None:
    group = make_optimizer(flags("SGDNesterov"), one_group()).param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    group = make_optimizer(flags("SGDNesterov", "momentum=0.5"), one_group()).param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.5)


def test_adafactor_sets_its_own_rate_unless_told_otherwise() -> None:
    groups = one_group()
    groups[0]["lr"] = 1e-4
    optimizer = make_optimizer(flags("Adafactor", learning_rate=1e-3), groups)
    assert optimizer.param_groups[0]["lr"] is None
    assert optimizer.param_groups[0]["relative_step"] is True
    fixed = make_optimizer(flags("Adafactor", "relative_step=False", learning_rate=1e-3), groups)
    assert fixed.param_groups[0]["lr"] == 1e-4


def test_adafactor_warmup_needs_and_switches_on_its_own_rate(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = make_optimizer(flags("Adafactor", "relative_step=False", "warmup_init=True"), one_group())
    assert optimizer.param_groups[0]["relative_step"] is True
    assert optimizer.param_groups[0]["lr"] is None
    assert "warmup_init needs relative_step" in caplog.text


def test_adafactor_with_a_given_rate_warns_of_clipping_twice(caplog: pytest.LogCaptureFixture) -> None:
    make_optimizer(flags("Adafactor", "relative_step=False", "clip_threshold=2.0", max_grad_norm=1.0), one_group())
    assert "--max_grad_norm 0 is advised, it is 1.0" in caplog.text
    assert "clip_threshold=1.0 is advised, it is 2.0" in caplog.text


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptAdaGrad"])
def test_two_rates_are_refused_by_optimizers_that_know_one(name: str) -> None:
    groups = one_group() + one_group()
    groups[0]["lr"], groups[1]["lr"] = 1.0, 16.0
    with pytest.raises(ValueError, match=r"one learning rate .* the groups have 1\.0, 16\.0.*--text_encoder_lr"):
        make_optimizer(flags(name, learning_rate=1.0), groups)


def test_a_small_rate_for_an_optimizer_that_finds_its_own_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    make_optimizer(flags("Prodigy", learning_rate=1e-4), one_group())
    assert "1.0 is usual, not 0.0001" in caplog.text
    caplog.clear()
    make_optimizer(flags("Prodigy", learning_rate=1.0), one_group())
    assert "usual" not in caplog.text


def test_torch_takes_its_one_kernel_step_unless_another_is_asked_for() -> None:
    assert make_optimizer(flags(), one_group()).param_groups[0]["fused"] is True
    assert make_optimizer(flags("SGD"), one_group()).param_groups[0]["fused"] is True
    assert make_optimizer(flags("", "foreach=True"), one_group()).param_groups[0]["fused"] is None


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("AdamW", 1e-8), ("RAdam", 0.0), ("Lion", 0.0), ("PagedAdamW32bit", 0.0), ("AdamWScheduleFree", 0.0)]
    + [("Prodigy", 1e-6), ("DAdaptAdam", 2e-6), ("DAdaptSGD", 1e-6)],
)
def test_an_elementwise_optimizer_moves_a_flat_tensor_as_it_moves_the_parts(name: str, tolerance: float) -> None:
    settings = flags(name, learning_rate=1.0 if tolerance > 1e-7 else 1e-2)
    assert is_elementwise(settings)
    torch.manual_seed(0)
    parts = [torch.randn(6, 4), torch.zeros(3, 5), torch.randn(7)]
    separate = [{"params": [nn.Parameter(part.clone()) for part in parts]}]
    flat = [{"params": [nn.Parameter(torch.cat([part.flatten() for part in parts]))]}]
    for groups in (separate, flat):
        train(make_optimizer(settings, groups), 10)
    moved = torch.cat([p.detach().flatten() for p in separate[0]["params"]])
    assert (moved - flat[0]["params"][0]).abs().max().item() <= tolerance
    assert (moved - torch.cat([part.flatten() for part in parts])).abs().max().item() > 1e-6


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "Adafactor", "pytorch_optimizer.CAME"])
def test_optimizers_that_look_at_tensors_or_blocks_are_not_elementwise(name: str) -> None:
    assert not is_elementwise(flags(name))


def test_an_argument_can_make_an_optimizer_look_at_whole_tensors() -> None:
    assert is_elementwise(flags("Prodigy", "slice_p=1"))
    assert not is_elementwise(flags("Prodigy", "slice_p=11"))


def test_8_bit_adam_follows_adamw_on_the_cpu() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 128)  # above 4,096 elements, so the states really have 8 bits
    ends = []
    for name in ("AdamW8bit", "AdamW"):
        parameter = nn.Parameter(start.clone())
        optimizer = make_optimizer(flags(name, learning_rate=1e-3), [{"params": [parameter]}])
        train(optimizer, 20)
        ends.append(parameter.detach() - start)
    assert (ends[0] - ends[1]).norm().item() < 0.05 * ends[1].norm().item()


def test_schedule_free_weights_are_switched_for_use_and_back() -> None:
    groups = one_group()
    optimizer = make_optimizer(flags("AdamWScheduleFree", learning_rate=0.1), groups)
    train(optimizer, 5)
    parameter = groups[0]["params"][0]
    training = parameter.detach().clone()
    with evaluating(optimizer):
        inside = parameter.detach().clone()
    assert not torch.equal(inside, training)
    torch.testing.assert_close(parameter.detach(), training)


def test_weights_are_switched_back_after_an_error() -> None:
    optimizer = make_optimizer(flags("SGDScheduleFree", learning_rate=0.1), one_group())
    with pytest.raises(RuntimeError), evaluating(optimizer):
        raise RuntimeError
    assert optimizer.param_groups[0]["train_mode"] is True


def test_evaluating_leaves_other_optimizers_alone() -> None:
    groups = one_group()
    before = groups[0]["params"][0].detach().clone()
    with evaluating(make_optimizer(flags(), groups)):
        assert torch.equal(groups[0]["params"][0], before)


def test_the_description_names_class_and_arguments() -> None:
    assert optimizer_description(choose_optimizer(flags())) == "torch.optim.adamw.AdamW"
    described = optimizer_description(choose_optimizer(flags("", "weight_decay=0.1", "betas=.9,.99")))
    assert described == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"


def test_the_choice_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_optimizer(flags("Lion", "weight_decay=0.1"), one_group())
    assert "optimizer: lion_pytorch.lion_pytorch.Lion(weight_decay=0.1)" in caplog.text
