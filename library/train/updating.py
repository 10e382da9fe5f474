"""Which way of updating the weights the settings ask for."""

from __future__ import annotations

from accelerate import Accelerator

from library.flags.optimizer import OptimizerFlags
from library.flags.run import DistributedFlags
from library.flags.settings import Settings
from library.train.deepspeed_updates import DeepSpeedUpdates
from library.train.fused_updates import FusedUpdates
from library.train.state import ParameterGroups, Plan
from library.train.updates import FlatUpdates, Updates


def updates_of_run(settings: Settings, groups: ParameterGroups, accelerator: Accelerator, plan: Plan) -> Updates:
    """What moves the weights of `groups`, which have their final device and dtype."""
    kind: type[FusedUpdates | DeepSpeedUpdates | FlatUpdates] = FlatUpdates
    if settings[OptimizerFlags].fused_backward_pass:
        kind = FusedUpdates
    elif settings[DistributedFlags].deepspeed:
        kind = DeepSpeedUpdates
    return kind(settings, groups, accelerator, plan)
