"""What may be said to the tool that shows how timesteps are drawn."""

from dataclasses import dataclass
from pathlib import Path

from library.flags.dataset import width_and_height
from library.flags.declare import flag


@dataclass(frozen=True)
class LimitFlags:
    """Limits"""

    min_timestep: int | None = flag(None, "lowest timestep drawn", at_least=0, at_most=999)
    max_timestep: int | None = flag(None, "highest timestep drawn", at_least=1, at_most=1000)


@dataclass(frozen=True)
class ShowFlags:
    """What is shown"""

    resolution: tuple[int, int] | None = flag(
        None, "size of the training images for flux_shift: one number, or width,height (1024 unless given)",
        type=str, parse=width_and_height,
    )  # fmt: skip
    draws: int = flag(100_000, "timesteps drawn", at_least=1, at_most=10_000_000)
    seed: int = flag(0, "seed of the draws", at_least=0)
    compare: tuple[str, ...] | None = flag(
        None,
        "more settings to show beside these: each one text such as 'timestep_sampling=shift discrete_flow_shift=2'",
    )
    output: Path | None = flag(None, "write a picture to this .png file too")
