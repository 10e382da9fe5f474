"""Which optimizer --optimizer_type and --optimizer_args ask for, and what is special about it."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from library.flags.optimizer import OptimizerFlags

logger = logging.getLogger(__name__)

OPTIMIZERS: Mapping[str, str] = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion": "lion_pytorch.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "Prodigy": "prodigyopt.Prodigy",
    "Adafactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
"""Names that are compared without regard to case; any other is a class of torch.optim or a dotted path."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "SGDNesterov": {"nesterov": True, "momentum": 0.9},
    "SGDNesterov8bit": {"nesterov": True, "momentum": 0.9},
}
"""Arguments that a name stands for, unless --optimizer_args gives them."""

PACKAGES: Mapping[str, str] = {
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
    "prodigyplus": "prodigy-plus-schedule-free",
}
"""What to install for a module whose package has another name."""

ELEMENTWISE = frozenset(
    [f"torch.optim.{name}" for name in ("Adam", "AdamW", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam")]
    + [f"torch.optim.{name}" for name in ("RMSprop", "Rprop", "SGD")]
    + ["bitsandbytes.optim." + name for name in ("Adam", "Adam32bit", "AdamW", "AdamW32bit", "PagedAdam")]
    + ["bitsandbytes.optim." + name for name in ("PagedAdam32bit", "PagedAdamW", "PagedAdamW32bit", "Lion")]
    + ["bitsandbytes.optim." + name for name in ("Lion32bit", "PagedLion", "PagedLion32bit", "SGD", "SGD32bit")]
    + ["lion_pytorch.Lion"]
    + [f"schedulefree.{name}ScheduleFree" for name in ("AdamW", "RAdam", "SGD")]
    # These sum |s|, s * s or g * (p0 - p) over every parameter of every group, so where one tensor ends does not
    # matter to them, except that a float sum in another order differs in its last bits. Tensor by tensor they
    # wait for the device once or twice each; flat, once or twice a group.
    + [f"dadaptation.DAdapt{name}" for name in ("AdaGrad", "Adam", "Adan", "Lion", "SGD")]
    + ["dadaptation.experimental.DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdanIP", "prodigyopt.Prodigy"]
)
"""Optimizers that treat every element alike, wherever the borders between tensors lie.

Flat and in parts they agree to the bit, but for the fused ones of torch, whose last few elements of a tensor go
through a scalar loop and may differ by one unit in the last place.

Not among them: 8-bit optimizers (one scale per block of 256 elements, counted from the start of each tensor, and
tensors below 4,096 elements stay in 32 bits), Adafactor and CAME (rows and columns of a matrix), and those that
scale by the norm of a tensor (LAMB, LARS). A dotted path that is not listed counts as not elementwise.
"""

TENSOR_ARGUMENTS: Mapping[str, object] = {"slice_p": 1, "max_unorm": 0.0, "percentile_clipping": 100}
"""Arguments with which an elementwise optimizer looks at whole tensors, unless they have this value."""

FUSED = frozenset(["torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.Adagrad"])
"""Optimizers of torch with a one-kernel step. One step over 1.5 M floats on one core: 1.05 ms against 3.96 ms
(foreach) and 4.40 ms (loop) as one tensor, 3.5, 13.4 and 21.6 ms as 408 tensors."""

FUSED_DEVICES = frozenset(["cpu", "cuda", "mps", "xpu"])
FUSED_ALTERNATIVES = frozenset(["fused", "foreach", "capturable", "differentiable"])

FINDS_ITS_RATE = ("dadaptation.", "prodigyopt.")
"""Packages whose optimizers estimate the step size and take the learning rate as a factor of it."""

ONE_RATE = frozenset(
    [
        "dadaptation.DAdaptAdam",
        "dadaptation.DAdaptLion",
        "dadaptation.DAdaptSGD",
        "dadaptation.experimental.DAdaptAdamPreprint",
        "prodigyopt.Prodigy",
    ]
)
"""Optimizers that stop at their first step when two groups have different rates other than 0."""

FIRST_GROUP_RATE = frozenset(
    [
        "dadaptation.DAdaptAdaGrad",
        "dadaptation.DAdaptAdan",
        "dadaptation.experimental.DAdaptAdanIP",
    ]
)
"""Optimizers that use the rate of the first group for every group, without a word."""


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer, not yet given anything to optimize."""

    optimizer_class: type[Optimizer]
    path: str
    """Where the class was asked for, such as `torch.optim.AdamW`."""
    learning_rate: float | None
    """None for one that sets its own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sets_its_own_rate(self) -> bool:
        """Adafactor with relative_step: no learning rate, and a schedule that only reports."""
        return self.learning_rate is None


def choose_optimizer(flags: OptimizerFlags) -> OptimizerChoice:
    """The optimizer that `flags` name, with its arguments checked.

    Raises ValueError for an unknown name, a package that is not installed, or an argument that the optimizer
    does not take.
    """
    name = known_name(flags.optimizer_type)
    path = OPTIMIZERS.get(name, name)
    optimizer_class = import_class(path if "." in path else f"torch.optim.{path}", "--optimizer_type")
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise ValueError(f"--optimizer_type {flags.optimizer_type}: {path} is not an optimizer class")
    path = path if "." in path else f"torch.optim.{path}"
    arguments = dict(PRESETS.get(name, {})) | parse_arguments(flags.optimizer_args, "--optimizer_args")
    check_arguments(optimizer_class, arguments, "--optimizer_args", reserved={"params", "lr"})
    rate: float | None = flags.learning_rate
    if path == OPTIMIZERS["Adafactor"]:
        # relative_step is on unless switched off, and warmup_init cannot do without it.
        arguments["relative_step"] = bool(arguments.get("relative_step", True) or arguments.get("warmup_init"))
        rate = None if arguments["relative_step"] else rate
    return OptimizerChoice(optimizer_class, path, rate, arguments)


def make_optimizer(flags: OptimizerFlags, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that `flags` name over `groups` of `params`, each with its own `lr` or --learning_rate.

    `groups` are not changed. Raises ValueError as `choose_optimizer` does, and for rates that the optimizer
    cannot serve.
    """
    choice = choose_optimizer(flags)
    if choice.path == OPTIMIZERS["Adafactor"]:
        warn_of_adafactor(flags, choice)
    if choice.learning_rate is None:
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    else:
        groups = [{"lr": choice.learning_rate} | group for group in groups]
        check_rates(choice, [float(group["lr"]) for group in groups])
    arguments = dict(choice.arguments)
    if prefers_fused(choice, groups):
        arguments["fused"] = True
    try:
        optimizer = choice.optimizer_class(groups, lr=choice.learning_rate, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError) as error:
        given = " ".join(flags.optimizer_args or ())
        raise ValueError(
            f"{choice.path} refuses --optimizer_args {given!r} with learning rate {choice.learning_rate}: {error}"
        ) from error
    to_train = getattr(optimizer, "train", None)
    if to_train is not None:
        to_train()
    logger.info("optimizer: %s", optimizer_description(choice))
    return optimizer


def optimizer_description(choice: OptimizerChoice) -> str:
    """`module.Class(argument=value,...)`, as metadata holds it; no brackets when there are no arguments."""
    cls = choice.optimizer_class
    arguments = ",".join(f"{name}={value}" for name, value in choice.arguments.items())
    return f"{cls.__module__}.{cls.__name__}" + (f"({arguments})" if arguments else "")


def is_elementwise(flags: OptimizerFlags) -> bool:
    """Whether one flat tensor in place of many leaves the result of every step unchanged."""
    choice = choose_optimizer(flags)
    by_tensor = any(choice.arguments.get(name, value) != value for name, value in TENSOR_ARGUMENTS.items())
    return choice.path in ELEMENTWISE and not by_tensor


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """While the context lasts the parameters are those to be used, saved and judged.

    Schedule-free optimizers train at another point than the one they arrive at; for all others nothing happens.
    """
    to_eval, to_train = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if to_eval is None or to_train is None:
        yield
        return
    # The way there and back is rounded, so without copies a run that saves would not be the one that does not.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    to_eval()
    try:
        yield
    finally:
        to_train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def known_name(optimizer_type: str | None) -> str:
    """The table's spelling of a name, AdamW for none; a name outside the table comes back as it was given."""
    given = optimizer_type or "AdamW"
    spelling = {name.lower(): name for name in OPTIMIZERS}
    return spelling.get(given.lower(), given)


def import_class(path: str, flag: str) -> Any:
    """The class at a dotted `path`; ValueError tells what to install or which name is near."""
    module_name, _, class_name = path.rpartition(".")
    package = module_name.split(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        name = PACKAGES.get(package, package)
        raise ValueError(f"{flag} {path} needs a package that is not installed: pip install {name}") from error
    if not hasattr(module, class_name):
        names = [name for name in dir(module) if name[:1].isupper()] + list(OPTIMIZERS)
        near = difflib.get_close_matches(class_name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{flag}: {module_name} has no class {class_name}{hint}")
    return getattr(module, class_name)


def parse_arguments(pairs: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """`name=value` texts -> values; a value is a Python literal, so `betas=0.9,0.99` is a tuple."""
    arguments: dict[str, Any] = {}
    for pair in pairs or ():
        name, separator, text = pair.partition("=")
        if not separator or not name or "=" in text:
            raise ValueError(f"{flag}: expected name=value, got {pair!r}")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"{flag}: {name}={text} is not a Python value; write numbers, True, False, None, a,b "
                f"or quoted text such as \"{name}='{text}'\""
            ) from error
    return arguments


def check_arguments(
    target: Any, arguments: Mapping[str, Any], flag: str, reserved: frozenset[str] | set[str] = frozenset()
) -> None:
    """ValueError for an argument that `target` does not take or that another flag decides."""
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name not in reserved and name not in ("args", "kwargs")]
    for name in arguments:
        if name in reserved:
            cure = "use --learning_rate, --unet_lr and --text_encoder_lr" if name == "lr" else "it is set by the run"
            raise ValueError(f"{flag}: {name} cannot be given here; {cure}")
        if name not in parameters and not takes_any:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{flag}: {target.__name__} has no argument {name}; {hint}It takes {', '.join(known)}")


def warn_of_adafactor(flags: OptimizerFlags, choice: OptimizerChoice) -> None:
    """Say what Adafactor makes of settings that do not go well with it."""
    given = parse_arguments(flags.optimizer_args, "--optimizer_args")
    if choice.sets_its_own_rate:
        if given.get("relative_step") is False:
            logger.warning("Adafactor: warmup_init needs relative_step, which is switched on")
        logger.info("Adafactor sets its own learning rate (relative_step); the rates given are not used")
        return
    if flags.max_grad_norm != 0.0:
        logger.warning("Adafactor clips by itself: --max_grad_norm 0 is advised, it is %s", flags.max_grad_norm)
    if given.get("clip_threshold", 1.0) != 1.0:
        logger.warning("Adafactor: clip_threshold=1.0 is advised, it is %s", given["clip_threshold"])


def check_rates(choice: OptimizerChoice, rates: Sequence[float]) -> None:
    """Refuse rates that the optimizer would fail on or drop; warn of those that make it useless."""
    different = sorted({rate for rate in rates if rate != 0.0})
    shown = ", ".join(str(rate) for rate in different)
    if len(different) > 1 and choice.path in ONE_RATE | FIRST_GROUP_RATE:
        raise ValueError(
            f"{choice.path} knows one learning rate for everything that is trained, but the groups have {shown}: "
            "give --unet_lr, --text_encoder_lr and --learning_rate the same value, and no LoRA+ ratio or block rates"
        )
    if choice.path.startswith(FINDS_ITS_RATE) and different and different[0] <= 0.1:
        logger.warning("%s finds the step size itself and multiplies it by the rate: 1.0 is usual, not %s",
                       choice.path, shown)  # fmt: skip


def prefers_fused(choice: OptimizerChoice, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the one-kernel step of torch works for these parameters and nothing else was asked for."""
    if choice.path not in FUSED or FUSED_ALTERNATIVES & choice.arguments.keys():
        return False
    parameters = [parameter for group in groups for parameter in _tensors(group["params"])]
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _tensors(params: Any) -> list[torch.Tensor]:
    # A generator would be used up before the optimizer sees it; torch's own groups are lists or one tensor.
    assert not isinstance(params, Iterator), "parameter groups must hold lists"
    return [params] if isinstance(params, torch.Tensor) else list(params)
