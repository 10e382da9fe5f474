"""Which adapters learn at which rate: the parameter groups of a network, and what is not trained at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from networks.core.adapter import Adapter
from networks.core.targets import Target

logger = logging.getLogger(__name__)

Rates = float | Sequence[float] | None
Pairs = Sequence[tuple[Target, Adapter]]


@dataclass(frozen=True)
class LoraPlus:
    """LoRA+ (https://arxiv.org/abs/2402.12354): the second matrix learns `ratio` times as fast; None is equally."""

    text_encoder: float | None = None
    unet: float | None = None


@dataclass
class ParameterGroups:
    """What an optimizer is given, and a name for each group."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, pairs: Pairs, rate: float | None, ratio: float | None, name: str) -> None:
        """Groups of one part of the model, whose rate is `rate`; those with a rate of their own come first.

        Adapters whose rate is 0 or None are put to rest.
        """
        by_group: dict[tuple[str, float, float | None], list[Adapter]] = {}
        for target, adapter in pairs:
            by_group.setdefault((target.group, target.rate, target.own_rate), []).append(adapter)
        own = sorted((key for key in by_group if key[2] is not None), key=lambda key: key[0])
        for key in [*own, *(key for key in by_group if key[2] is None)]:
            group, share, own_rate = key
            full = own_rate if own_rate is not None else None if rate is None else rate * share
            if not full:
                _put_to_rest(by_group[key], name + group)
                continue
            for parameters, faster, suffix in _split_for_lora_plus(by_group[key], ratio):
                self.groups.append({"params": parameters, "lr": full * faster})
                self.names.append(name + group + suffix)


def encoder_rates(given: Rates, encoders: int, default: float | None) -> list[float | None]:
    """The learning rate of each text encoder; one rate is for all of them.

    Raises:
        ValueError: there are as many rates as neither one nor the text encoders.
    """
    if isinstance(given, Sequence):
        if len(given) > 1 and encoders and len(given) != encoders:
            raise ValueError(f"--text_encoder_lr has {len(given)} rates and the model has {encoders} text encoder(s)")
        rates: list[float | None] = list(given)
    else:
        rates = [] if given is None else [given]
    rates = rates or [default]
    return rates * encoders if len(rates) == 1 else rates[:encoders]


def _put_to_rest(adapters: Sequence[Adapter], name: str) -> None:
    """Leave `adapters` out of training, and out of the model unless they came from a file."""
    for adapter in adapters:
        adapter.requires_grad_(False)
        adapter.frozen = True
        adapter.resting = not adapter.loaded
    kept = sum(adapter.loaded for adapter in adapters)
    logger.warning(
        "%s: the learning rate is 0, so its %d adapters are not trained; %s",
        name,
        len(adapters),
        f"{kept} were loaded from a file and are kept and saved as they are" if kept else "they are not saved either",
    )


def _split_for_lora_plus(
    adapters: Sequence[Adapter], ratio: float | None
) -> Iterator[tuple[list[nn.Parameter], float, str]]:
    """The parameters of `adapters` in one group, or with LoRA+ in two: (parameters, share of the rate, suffix)."""
    halves = [adapter.halves() for adapter in adapters]
    if ratio is None:
        yield [weight for slow, fast in halves for weight in (*slow, *fast)], 1.0, ""
        return
    groups = (([weight for slow, _ in halves for weight in slow], 1.0, ""),
              ([weight for _, fast in halves for weight in fast], ratio, " plus"))  # fmt: skip
    yield from (group for group in groups if group[0])
