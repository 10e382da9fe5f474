"""Writing a whole Stable Diffusion model: some weights new, all others as they lie in the model it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.files.atomic import replacing_folder
from library.files.sources import Source
from library.files.weights import open_weights
from library.files.whole_model import Value, check_written, write_tensors
from library.models.sd.checkpoint import opened_part, opened_parts
from library.models.sd.slots import diffusers_slots, filled, published_file, published_vae_slots, slots_in
from library.models.vae.sd import LDM_PREFIX

Trained = Mapping[str, Mapping[str, Tensor]]
"""unet, text_encoder or both -> the new weights, all of the part, by the names of our modules."""

FOLDER_KINDS: Mapping[str, Mapping[str, str]] = {
    "diffusers": {
        "unet": "unet/diffusion_pytorch_model.bin",
        "text_encoder": "text_encoder/pytorch_model.bin",
        "vae": "vae/diffusion_pytorch_model.bin",
    },
    "diffusers_safetensors": {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
    },
}
"""Kinds of --save_model_as that are folders -> the file of each part; the others are single files."""

LEFT_OUT = ("model_ema.", "loss.")
"""Of a single file: a moving average of the weights as they were before, and what only its own training needed."""


@dataclass(frozen=True)
class ModelWriter:
    """Writes models that come from `base`, with `vae` in the place of its own if given."""

    base: Path
    """A single file, or a folder of diffusers."""
    vae: Path | None
    v2: bool
    kind: str
    """ckpt, safetensors, diffusers or diffusers_safetensors."""
    dtype: torch.dtype | None = None
    """Of the weights of all three parts; None leaves each what it is. Tables and unused layers stay in any case."""
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies beside the weights in a folder: path in it -> content."""

    def write(self, path: Path, trained: Trained, metadata: Mapping[str, str], step: int, epoch: int) -> dict[str, str]:
        """Write the file or folder, whole or not at all; name of each file -> its SHA-256.

        `metadata` goes into a .safetensors file, `step` and `epoch` into a .ckpt.
        """
        with self.planned(trained) as files:
            if self.kind not in FOLDER_KINDS:
                beside = {"global_step": step, "epoch": epoch}
                return {path.name: write_tensors(files[""], path, metadata, beside)}
            hashes = {}
            with replacing_folder(path) as folder:
                for name, content in self.small_files.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(content)
                for name, values in files.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    # transformers refuses a file that does not say which library its tensors are for.
                    hashes[f"{path.name}/{name}"] = write_tensors(values, folder / name, {"format": "pt"})
            return hashes

    def check(self, path: Path, trained: Trained) -> None:
        """Reopen what was written; ValueError unless every key of the published layout is in it, in its shape.

        `trained` may lie on the meta device.
        """
        with self.planned(trained) as files:
            for name, values in files.items():
                check_written(path / name, {key: value.shape for key, value in values.items()})

    def size(self, trained: Trained) -> int:
        """Bytes of the weights; `trained` may lie on the meta device."""
        with self.planned(trained) as files:
            return sum(value.nbytes for values in files.values() for value in values.values())

    @contextmanager
    def planned(self, trained: Trained) -> Iterator[dict[str, dict[str, Value]]]:
        """Each file and its tensors; "" for a single one. They can be read while the context lasts."""
        with ExitStack() as stack:
            sources = stack.enter_context(opened_parts(self.base, self.vae, self.v2))
            new = {part: {name: Value.of(tensor) for name, tensor in each.items()} for part, each in trained.items()}
            old = {
                part: {name: Value.stored(source) for name, source in each.items()} for part, each in sources.items()
            }
            parts = old | new
            if self.kind in FOLDER_KINDS:
                yield {
                    file: self._part(stack, part, parts[part], sources[part])
                    for part, file in FOLDER_KINDS[self.kind].items()
                }
            elif self.base.is_dir():
                yield {"": published_file(parts, self.v2, self.dtype)}
            else:
                yield {"": self._same_file(stack, parts, sources)}

    def _part(
        self, stack: ExitStack, part: str, values: dict[str, Value], sources: Mapping[str, Source]
    ) -> dict[str, Value]:
        """One file of a folder: with the keys of the base if that is a folder too."""
        if not self.base.is_dir() or (part == "vae" and self.vae is not None):
            return filled(diffusers_slots(part, values), values, self.dtype)
        file = stack.enter_context(opened_part(self.base, part))
        kept = {key: Value.stored(Source(file, key)) for key in file.keys()}
        return kept | filled(slots_in(sources), values, self.dtype)

    def _same_file(
        self,
        stack: ExitStack,
        parts: Mapping[str, dict[str, Value]],
        sources: Mapping[str, Mapping[str, Source]],
    ) -> dict[str, Value]:
        """A single file with the keys of the base, in their order."""
        file = stack.enter_context(open_weights(self.base))
        kept = {key: Value.stored(Source(file, key)) for key in file.keys() if not key.startswith(LEFT_OUT)}
        for part in ("unet", "text_encoder"):
            kept |= filled(slots_in(sources[part]), parts[part], self.dtype)
        if self.vae is None:
            return kept | filled(slots_in(sources["vae"]), parts["vae"], self.dtype)
        others = {key: value for key, value in kept.items() if not key.startswith(LDM_PREFIX)}
        return others | filled(published_vae_slots(parts["vae"]), parts["vae"], self.dtype)
