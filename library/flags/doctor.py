"""What the dataset doctor may be asked, besides the flags about images and captions."""

from dataclasses import dataclass

from library.flags.declare import flag
from library.flags.model import token_length


@dataclass(frozen=True)
class DoctorFlags:
    """Dataset doctor"""

    json: str | None = flag(None, "write what was found as JSON to this file; - is the console")
    html: str | None = flag(None, "write a page with pictures to this file")
    masked_loss: bool = flag(False, "the images in conditioning_data_dir are masks")
    max_train_epochs: int | None = flag(None, "epochs of the run, to know its number of steps", at_least=1)
    gradient_accumulation_steps: int = flag(1, "batches in one step", at_least=1)
    tokenizer_cache_dir: str | None = flag(None, "folder with copies of the tokenizers, to count tokens exactly")
    v2: bool = flag(False, "count with the tokenizer of Stable Diffusion 2.x")
    max_token_length: int | None = flag(
        None,
        "caption length in tokens that the training takes (75 unless given)",
        choices=(None, 75, 150, 225),
        parse=token_length,
    )
