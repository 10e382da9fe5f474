"""OFT under the name that is known for FLUX; networks.oft is the same; for every family of models."""

from __future__ import annotations

from functools import partial

from networks.core.contract import create, create_from_weights
from networks.core.kinds import Oft
from networks.families import build, build_from_weights

create_network = partial(create, Oft, build)
create_network_from_weights = partial(create_from_weights, Oft, build_from_weights)
