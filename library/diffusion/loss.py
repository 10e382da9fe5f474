"""The loss of each element, and the masks laid over it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.flags.objective import LossFlags

THRESHOLD_LOSSES = ("huber", "smooth_l1")
"""Loss types that are quadratic below a threshold and linear above it."""


def elementwise(prediction: Tensor, target: Tensor, loss_type: str, threshold: Tensor | None = None) -> Tensor:
    """The loss of every element, [B, C, h, w], in float32.

    `threshold` [B] belongs to huber and smooth_l1: their pseudo-Huber form is `2 c (sqrt(d^2 + c^2) - c)` and
    the same without the leading `c`. Raises ValueError for an unknown `loss_type`.
    """
    difference = prediction.float() - target.float()
    if loss_type == "l2":
        return difference.square()
    if loss_type == "l1":
        return difference.abs()
    if loss_type not in THRESHOLD_LOSSES:
        raise ValueError(f"--loss_type {loss_type} is unknown; choose l1, l2, huber or smooth_l1")
    assert threshold is not None
    c = threshold.view(-1, 1, 1, 1)
    pseudo = 2 * ((difference.square() + c.square()).sqrt() - c)
    return c * pseudo if loss_type == "huber" else pseudo


def thresholds(flags: LossFlags, t: Tensor, sigmas: Tensor) -> Tensor:
    """The threshold `c` of huber and smooth_l1 at each timestep `t` [N] in 0..1000 with noise-to-signal `sigmas` [N].

    `snr` takes no notice of --huber_scale. Raises ValueError for a --huber_c that has no logarithm.
    """
    if flags.huber_schedule == "snr":
        return (1 - flags.huber_c) / (1 + sigmas).square() + flags.huber_c
    if flags.huber_schedule == "constant":
        return torch.full_like(sigmas, flags.huber_c * flags.huber_scale)
    if flags.huber_c <= 0:
        raise ValueError(f"--huber_c {flags.huber_c} must be above 0 with --huber_schedule exponential")
    return flags.huber_scale * torch.pow(flags.huber_c, t.to(sigmas.dtype) / 1000)


def masked(loss: Tensor, masks: Tensor) -> Tensor:
    """`loss` [B, C, h, w] times `masks` [B, 1, H, W] shrunk to its size; the mean is not made up for what is lost."""
    return loss * interpolate(masks.to(loss), loss.shape[2:], mode="area")
