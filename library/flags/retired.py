"""Old spellings: they still work, with a warning, and set the new flag before anything reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.flags.declare import flag


@dataclass(frozen=True)
class RetiredFlags:
    """Old spellings"""

    caption_extention: str | None = flag(None, "old spelling of caption_extension")
    use_8bit_adam: bool = flag(False, "old spelling of optimizer_type AdamW8bit")
    use_lion_optimizer: bool = flag(False, "old spelling of optimizer_type Lion")


OPTIMIZERS = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def replace_retired(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the user gave, said with today's flags, and a warning for each replacement.

    Raises:
        ValueError: an old and a new flag ask for different things.
    """
    values = dict(given)
    warnings = []
    if "caption_extention" in values:
        values["caption_extension"] = values.pop("caption_extention")
        warnings.append("--caption_extention is the old spelling of --caption_extension, and wins over it")
    optimizers = [name for name in OPTIMIZERS if values.pop(name, False)]
    asked = [f"--{name}" for name in optimizers] + (["--optimizer_type"] if values.get("optimizer_type") else [])
    if optimizers and len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} both choose the optimizer; keep one")
    for name in optimizers:
        values["optimizer_type"] = OPTIMIZERS[name]
        warnings.append(f"--{name} is the old spelling of --optimizer_type={OPTIMIZERS[name]}")
    return values, warnings
