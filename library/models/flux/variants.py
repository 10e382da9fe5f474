"""The published models of this family and how they differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Facts of one model that its weights do not tell."""

    title: str
    model_type: str
    """The choice of --model_type."""
    text_tokens: int
    """Tokens that T5 reads unless --t5xxl_max_token_length says otherwise."""
    base_version: str
    """`ss_base_model_version`."""
    spec_architecture: str
    implementation: str
    takes_pooled: bool = True
    """CLIP-L's pooled state is an input."""
    ignores_guidance: bool = False
    """The guidance scale is no input."""
    extra_text_token: bool = False
    """One token of padding counts as text, as in its training."""


DEV = Variant("FLUX.1 dev", "flux", 512, "flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux")
SCHNELL = Variant(
    "FLUX.1 schnell",
    "flux",
    256,
    "flux1",
    "flux-1-schnell",
    "https://github.com/black-forest-labs/flux",
    ignores_guidance=True,
)
CHROMA = Variant(
    "Chroma",
    "chroma",
    512,
    "chroma",
    "chroma",
    "https://huggingface.co/lodestones/Chroma",
    takes_pooled=False,
    extra_text_token=True,
)


def variant_of(names: Collection[str]) -> Variant:
    """Which model has weights of these published names."""
    if any(name.startswith("distilled_guidance_layer.") for name in names):
        return CHROMA
    return DEV if "guidance_in.in_layer.bias" in names else SCHNELL
