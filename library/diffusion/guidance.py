"""How the answers with and without the prompt become one."""

from __future__ import annotations

from torch import Tensor


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from `uncond` towards `cond` and, for a `scale` above 1, beyond it.

    All tensors have one shape. Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).
    """
    return uncond + scale * (cond - uncond)
