"""LoKr: what is added to a weight is a Kronecker product; for every family of models."""

from __future__ import annotations

from functools import partial

from networks.core.contract import create, create_from_weights
from networks.core.kinds import LoKr
from networks.families import build, build_from_weights

create_network = partial(create, LoKr, build)
create_network_from_weights = partial(create_from_weights, LoKr, build_from_weights)
