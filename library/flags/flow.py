"""Training of flow models: at which noise levels they learn, and what their answer is taken for."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.flags.declare import flag


def above_zero(value: float) -> float:
    """A shift divides by what it is: 0 and less have no meaning."""
    if not value > 0:
        raise ValueError(f"must be above 0, got {value}")
    return value


@dataclass(frozen=True)
class FlowFlags:
    """Flow matching"""

    timestep_sampling: str = flag(
        "sigma",
        "how noise levels are drawn: from the shifted schedule (sigma), evenly (uniform), mostly from the middle "
        "(sigmoid), the same moved by discrete_flow_shift (shift) or by the size of the image (flux_shift)",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )
    sigmoid_scale: float = flag(1.0, "spread of sigmoid, shift and flux_shift: larger reaches further to both ends")
    model_prediction_type: str = flag(
        "sigma_scaled",
        "what the loss compares: the model's answer (raw), the answer plus its input (additive), or its input minus "
        "sigma times the answer (sigma_scaled)",
        choices=("raw", "additive", "sigma_scaled"),
    )
    discrete_flow_shift: float = flag(
        3.0, "how far sigma and shift move towards noise: 1 is not at all, above 1 more noise", parse=above_zero
    )


@dataclass(frozen=True)
class WeightingFlags:
    """Weights of noise levels"""

    weighting_scheme: str = flag(
        "uniform",
        "logit_normal and mode draw more of some noise levels with timestep_sampling sigma; sigma_sqrt and cosmap "
        "weigh the loss with model_prediction_type sigma_scaled; uniform and none do neither",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = flag(0.0, "middle of logit_normal: above 0 less noise, below 0 more")
    logit_std: float = flag(1.0, "spread of logit_normal", at_least=0.0)
    mode_scale: float = flag(1.29, "how strongly mode prefers the middle")


_NO_SNR = "the weights of flow models come from --weighting_scheme"
_PLAIN_NOISE = "flow models are trained with plain noise"
_EULER = "flow models make pictures with Euler steps"
_OTHER_MODEL = "it is about Stable Diffusion"

IDLE_WITH_FLOW: Mapping[str, str] = {
    "noise_offset": _PLAIN_NOISE,
    "noise_offset_random_strength": _PLAIN_NOISE,
    "multires_noise_iterations": _PLAIN_NOISE,
    "multires_noise_discount": _PLAIN_NOISE,
    "adaptive_noise_scale": _PLAIN_NOISE,
    "zero_terminal_snr": "the schedule of a flow model ends at pure noise",
    "min_snr_gamma": _NO_SNR,
    "debiased_estimation_loss": _NO_SNR,
    "scale_v_pred_loss_like_noise_pred": _NO_SNR,
    "v_pred_like_loss": _NO_SNR,
    "sample_sampler": _EULER,
    "v2": _OTHER_MODEL,
    "v_parameterization": _OTHER_MODEL,
    "clip_skip": _OTHER_MODEL,
}
"""Flags of every trainer that do nothing in training a flow model -> why."""
