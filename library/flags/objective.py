"""What noise is added, and how far from it an answer is."""

from dataclasses import dataclass

from library.flags.declare import flag, none_for_zero


@dataclass(frozen=True)
class NoiseFlags:
    """Noise"""

    noise_offset: float | None = flag(
        None, "strength of a constant added to the noise of each channel (0.05 or so); 0 is off", parse=none_for_zero
    )
    noise_offset_random_strength: bool = flag(False, "draw that strength between 0 and noise_offset for each step")
    multires_noise_iterations: int | None = flag(
        None, "levels of coarser noise laid over the noise (6 to 10 or so); 0 is off", parse=none_for_zero, at_least=0
    )
    ip_noise_gamma: float | None = flag(
        None, "strength of extra noise that the model sees but is not asked for; 0 is off", parse=none_for_zero
    )
    ip_noise_gamma_random_strength: bool = flag(False, "draw that strength between 0 and ip_noise_gamma")
    multires_noise_discount: float = flag(0.3, "strength of each coarser level relative to the one before")
    adaptive_noise_scale: float | None = flag(
        None, "add the size of the latents' mean times this to noise_offset, which it needs"
    )
    zero_terminal_snr: bool = flag(False, "change the noise schedule so that its last step is pure noise")
    min_timestep: int | None = flag(None, "lowest timestep drawn, 0 to 999", at_least=0, at_most=999)
    max_timestep: int | None = flag(None, "timesteps drawn are below this, 1 to 1000", at_least=1, at_most=1000)


@dataclass(frozen=True)
class LossFlags:
    """Loss"""

    loss_type: str = flag("l2", "distance between answer and target", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = flag(
        "snr",
        "how the threshold of huber and smooth_l1 follows the timestep",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = flag(0.1, "threshold of huber and smooth_l1", at_least=0)
    huber_scale: float = flag(1.0, "factor on the threshold, schedules constant and exponential", at_least=0)
    prior_loss_weight: float = flag(1.0, "weight of the loss of regularisation images", at_least=0)
    masked_loss: bool = flag(False, "weigh the loss by the red channel of the images in conditioning_data_dir")
    min_snr_gamma: float | None = flag(
        None,
        "limit the loss weight of timesteps with little noise (5 is usual); 0 is off",
        parse=none_for_zero,
        at_least=0,
    )
    scale_v_pred_loss_like_noise_pred: bool = flag(
        False, "weigh velocity loss like noise loss; needs v_parameterization"
    )
    v_pred_like_loss: float | None = flag(
        None, "part of velocity-like loss added to noise loss; 0 is off", parse=none_for_zero
    )
    debiased_estimation_loss: bool = flag(False, "weigh the loss by one over the root of the signal-to-noise ratio")
