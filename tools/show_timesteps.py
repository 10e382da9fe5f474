"""At which noise levels does a flow model learn with these settings? As text, and as a picture.

python tools/show_timesteps.py --timestep_sampling=shift --discrete_flow_shift=3.1582 --output=timesteps.png
python tools/show_timesteps.py --output=compare.png --compare timestep_sampling=sigmoid \
    "timestep_sampling=flux_shift resolution=1024"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from library.diffusion.flow import FlowMatching, loss_weights
from library.diffusion.process import Draws
from library.flags.command_line import CommandLine
from library.flags.flow import FlowFlags, WeightingFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.settings import Settings, read_settings
from library.flags.timestep_tool import LimitFlags, ShowFlags
from timestep_chart import Curve, draw_chart

NUM_BINS = 20
PIXELS_PER_TOKEN = 16
"""Side of the square of pixels that becomes one token: 8 for the autoencoder, 2 for the patches."""
BAR = 40
"""Characters of the longest bar."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


GROUPS = (FlowFlags, WeightingFlags, LimitFlags, ShowFlags)


def main(words: Sequence[str] | None = None) -> int:
    """Print the text and write the picture; 1 and one line on the error stream if the settings do not fit."""
    given = list(sys.argv[1:] if words is None else words)
    settings = read_settings(GROUPS, (__doc__ or "").splitlines()[0], argv=given)
    show = settings[ShowFlags]
    try:
        curves = [curve_of(one) for one in (settings, *compared(given, show.compare or ()))]
        print("\n\n".join(as_text(curve) for curve in curves))
        if show.output is not None:
            show.output.parent.mkdir(parents=True, exist_ok=True)
            draw_chart(curves).save(show.output, format="PNG")
            print(f"\n{show.output}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def compared(given: Sequence[str], others: Sequence[str]) -> list[Settings]:
    """The settings of --compare: what was given, changed by each of `others`."""
    kept = CommandLine(GROUPS, "", {}).read(given).values
    own = {f.name for f in fields(ShowFlags)} - {"draws", "seed", "resolution"}
    start = [f"--{name}={word(value)}" for name, value in kept.items() if name not in own and value is not None]
    return [read_settings(GROUPS, "", argv=[*start, *(f"--{part}" for part in one.split())]) for one in others]


def word(value: object) -> str:
    """A value of the command line as it was written there."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def curve_of(settings: Settings) -> Curve:
    """What a training with `settings` draws, in bins of equal width from 0 to 1000."""
    limits, show = settings[LimitFlags], settings[ShowFlags]
    noise = NoiseFlags(min_timestep=limits.min_timestep, max_timestep=limits.max_timestep)
    process = FlowMatching(noise, LossFlags(), settings[FlowFlags], settings[WeightingFlags])
    width, height = show.resolution or (1024, 1024)
    num_tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    sigmas = process.draw_sigmas(show.draws, num_tokens, Draws.seeded(show.seed))
    return Curve(
        name=described(settings),
        shares=shares(sigmas, torch.ones_like(sigmas)),
        weighted=weighted_shares(settings, sigmas),
        mean=1000 * float(sigmas.mean()),
        quantiles={q: 1000 * float(torch.quantile(sigmas.double()[:1_000_000], q)) for q in QUANTILES},
    )


def weighted_shares(settings: Settings, sigmas: Tensor) -> tuple[float, ...] | None:
    """How much each bin counts in the loss; None when all timesteps count the same."""
    if settings[FlowFlags].model_prediction_type != "sigma_scaled":
        return None
    weights = loss_weights(settings[WeightingFlags].weighting_scheme, sigmas)
    return None if weights is None else shares(sigmas, weights)


def shares(sigmas: Tensor, weights: Tensor) -> tuple[float, ...]:
    """The part of all `weights` [N] that lies in each bin of `sigmas` [N]; the parts add up to 1."""
    bins = (sigmas * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    sums = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, weights.double())
    return tuple((sums / sums.sum()).tolist())


def described(settings: Settings) -> str:
    """The settings that decide the distribution, those that have an effect only."""
    flow, weighting = settings[FlowFlags], settings[WeightingFlags]
    sampling, scheme = flow.timestep_sampling, weighting.weighting_scheme
    shown: dict[str, object] = {"timestep_sampling": sampling}
    if sampling in ("sigmoid", "shift", "flux_shift"):
        shown["sigmoid_scale"] = flow.sigmoid_scale
    if sampling in ("sigma", "shift"):
        shown["discrete_flow_shift"] = flow.discrete_flow_shift
    if sampling == "flux_shift":
        shown["resolution"] = "x".join(map(str, settings[ShowFlags].resolution or (1024, 1024)))
    if sampling == "sigma" and scheme in ("logit_normal", "mode"):
        names = ("logit_mean", "logit_std") if scheme == "logit_normal" else ("mode_scale",)
        shown |= {"weighting_scheme": scheme, **{name: getattr(weighting, name) for name in names}}
    if flow.model_prediction_type == "sigma_scaled" and scheme in ("sigma_sqrt", "cosmap"):
        shown |= {"weighting_scheme": scheme}
    limits = settings[LimitFlags]
    shown |= {f.name: getattr(limits, f.name) for f in fields(limits) if getattr(limits, f.name) is not None}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def as_text(curve: Curve) -> str:
    """A line for each bin, and its share of the loss where that is another one."""
    highest = max(*curve.shares, *(curve.weighted or (0.0,)))
    lines = [curve.name]
    for index, share in enumerate(curve.shares):
        low = index * 1000 // NUM_BINS
        bar = "#" * round(BAR * share / highest)
        line = f"{low:4d}-{low + 1000 // NUM_BINS:<4d} {100 * share:5.1f} %  {bar}"
        if curve.weighted is not None:
            line = f"{line:<{BAR + 20}} {100 * curve.weighted[index]:5.1f} % of the loss"
        lines.append(line.rstrip())
    spread = ", ".join(f"{100 * q:g} % below {value:.0f}" for q, value in curve.quantiles.items())
    return "\n".join([*lines, f"mean {curve.mean:.0f}; {spread}"])


if __name__ == "__main__":
    sys.exit(main())
