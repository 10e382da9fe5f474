"""LoRA-FA: a LoRA of which only the second matrix is trained; for every family of models."""

from __future__ import annotations

from functools import partial

from networks.core.contract import create, create_from_weights
from networks.core.kinds import LoraFa
from networks.families import build, build_from_weights

create_network = partial(create, LoraFa, build)
create_network_from_weights = partial(create_from_weights, LoraFa, build_from_weights)
