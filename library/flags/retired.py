"""Old spellings: they still work, with a warning, and set the new flag before anything reads it."""

from dataclasses import dataclass

from library.flags.declare import flag


@dataclass(frozen=True)
class RetiredFlags:
    """Old spellings"""

    caption_extention: str | None = flag(None, "old spelling of caption_extension")
    use_8bit_adam: bool = flag(False, "old spelling of optimizer_type AdamW8bit")
    use_lion_optimizer: bool = flag(False, "old spelling of optimizer_type Lion")
