"""One batch -> one loss, the same for every model family."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from library.data.items import Batch
from library.diffusion.loss import masked
from library.diffusion.process import Draws, Noised
from library.models.architecture import Architecture, Condition
from library.models.text.tokens import row_lengths
from library.train.state import Models, Trained


def step_seed(seed: int, rank: int, micro_step: int) -> int:
    """The seed of everything random in one step of one rank, so that a step depends on nothing before it."""
    digest = blake2b(f"{seed}:{rank}:{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_loss(
    batch: Batch,
    arch: Architecture,
    models: Models,
    trained: Trained,
    draws: Draws,
    t: float | None = None,
) -> Tensor:
    """The loss of one batch on its own device, a scalar; `t` fixes the timestep of every row."""
    latents = latents_of(batch, arch, models, draws.noise)
    cond = condition_of(batch, arch, models, trained.trains_text_encoder)
    noised = arch.process.add_noise(latents, draws, t)
    return image_losses(batch, arch, models, trained, latents, noised, cond).mean()


def image_losses(
    batch: Batch,
    arch: Architecture,
    models: Models,
    trained: Trained,
    latents: Tensor,
    noised: Noised,
    cond: Condition,
) -> Tensor:
    """[B] the loss of each image of a batch whose latents have been noised, weighted as in training."""
    process = arch.process

    def ask(noised: Noised, cond: Condition) -> Tensor:
        return process.prediction(arch.predict(models.denoiser, noised.x, noised.t, cond), noised)

    target = process.target(latents, noised)
    if batch.keep_prior or models.asks_base:
        rows = list(batch.keep_prior) or [0]
        with torch.no_grad(), trained.off():
            prior = ask(noised.rows(rows), cond.rows(rows))
        if batch.keep_prior:
            target[rows] = prior.to(target.dtype)

    loss = process.elementwise_loss(ask(noised, cond), target, noised)
    if batch.masks is not None:
        loss = masked(loss, batch.masks)
    loss = loss.mean(dim=(1, 2, 3)) * batch.loss_weights  # [B]
    return process.weigh(loss, noised)


def latents_of(
    batch: Batch, arch: Architecture, models: Models, noise: torch.Generator | list[torch.Generator]
) -> Tensor:
    """[B, C, h, w] as the denoiser takes them, cached or encoded now, with one generator or one for each row."""
    if batch.latents is not None:
        return arch.scale_latents(batch.latents)
    assert batch.pixels is not None and models.vae is not None
    with torch.no_grad():
        return arch.scale_latents(arch.encode_image(models.vae, batch.pixels, noise))


def condition_of(batch: Batch, arch: Architecture, models: Models, train_text_encoder: bool) -> Condition:
    """The text of the batch, cached or encoded now; a live encoding replaces a cached one."""
    live: dict[str, Tensor] = {}
    lengths = batch.text_lengths
    if models.text_encoders:
        device = batch.loss_weights.device
        tokens = arch.tokenize(batch.captions)
        if lengths is None and arch.text.mask:
            lengths = row_lengths(tokens[arch.text.mask])  # before they are on a device that would be waited for
        tokens = {name: ids.to(device, non_blocking=True) for name, ids in tokens.items()}
        with torch.set_grad_enabled(train_text_encoder and torch.is_grad_enabled()):
            live = arch.encode_text(models.live_encoders, tokens)
    sizes = batch.sizes
    six = None if sizes is None else torch.cat([sizes.original, sizes.crop_top_left, sizes.target], dim=1)
    return arch.condition(batch.text | live, six, lengths)
