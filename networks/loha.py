"""LoHa: what is added to a weight is the product, number by number, of two low-rank matrices; for every family."""

from __future__ import annotations

from functools import partial

from networks.core.contract import create, create_from_weights
from networks.core.kinds import LoHa
from networks.families import build, build_from_weights

create_network = partial(create, LoHa, build)
create_network_from_weights = partial(create_from_weights, LoHa, build_from_weights)
