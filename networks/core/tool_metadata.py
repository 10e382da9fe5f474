"""What tools write about a file that they made from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.files.model_spec import build_model_spec, commit_hash
from networks.core.combining import dimensions
from networks.core.lora_file import LowRankPair


@dataclass(frozen=True)
class Family:
    """What metadata call a family of models."""

    base_version: str
    """ss_base_model_version of its LoRAs."""
    architecture: str
    implementation: str
    resolution: str

    @property
    def spec(self) -> dict[str, str]:
        """The fields that all its modelspecs share."""
        return {
            "architecture": self.architecture,
            "implementation": self.implementation,
            "resolution": self.resolution,
        }


@dataclass(frozen=True)
class Parent:
    """A file that another was made from."""

    path: str
    metadata: Mapping[str, str]

    @property
    def title(self) -> str:
        """Its title, or its name."""
        return self.metadata.get("modelspec.title") or Path(self.path).stem


def network_metadata(
    pairs: Mapping[str, LowRankPair],
    module: str,
    family: Family,
    target: Path,
    parents: Sequence[Parent] = (),
    with_spec: bool = True,
    args: str | None = None,
) -> dict[str, str]:
    """The metadata of a LoRA that a tool made; `args` is its ss_network_args."""
    rank, alpha = dimensions(pairs)
    metadata = {
        "ss_v2": "False",
        "ss_base_model_version": family.base_version,
        "ss_network_module": module,
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
    }
    if args is not None:
        metadata["ss_network_args"] = args
    return metadata | (spec_of(family, target, parents, "lora") if with_spec else {})


def spec_of(family: Family, target: Path, parents: Sequence[Parent], adapter: str | None) -> dict[str, str]:
    """The modelspec of `target`, made from `parents`; `adapter` is None for a whole model."""
    merged = ", ".join(parent.title for parent in parents) or None
    described = {"merged_from": merged}
    return build_model_spec(family.spec, described, title=target.stem, adapter=adapter, commit=commit_hash())
