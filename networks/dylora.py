"""DyLoRA: a LoRA whose file can be cut down to fewer ranks afterwards; for every family of models."""

from __future__ import annotations

from functools import partial

from networks.core.contract import create, create_from_weights
from networks.core.kinds import DyLora
from networks.families import build, build_from_weights

create_network = partial(create, DyLora, build)
create_network_from_weights = partial(create_from_weights, DyLora, build_from_weights)
