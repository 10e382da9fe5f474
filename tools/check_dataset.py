"""What is wrong with a dataset? `python tools/check_dataset.py data.toml` says it before the training does.

The trainer's flags about images and captions may stand in place of the file. The exit code is 0 when nothing will hurt
the training, 3 when something will, 1 when the settings cannot be read.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.checks import all_findings
from library.data.config import read_dataset_config
from library.data.report import Asked, Severity, as_table, collect
from library.data.report_page import as_page
from library.data.report_text import as_text
from library.flags.console import print_everything
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.doctor import DoctorFlags
from library.flags.settings import read_settings
from library.models.text.tokens import V1_TOKENIZER, V2_TOKENIZER, load_tokenizer

BUCKET_MULTIPLE = 8
"""What every family's bucket sides are multiples of."""


def main(words: Sequence[str] | None = None) -> int:
    """Look at everything and say what was found."""
    settings = read_settings(
        (DoctorFlags, DatasetFlags, CaptionFlags), (__doc__ or "").splitlines()[0], argv=_argv(words)
    )
    print_everything()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    doctor, dataset, captions = settings[DoctorFlags], settings[DatasetFlags], settings[CaptionFlags]
    try:
        asked = Asked(
            accumulation=doctor.gradient_accumulation_steps,
            epochs=doctor.max_train_epochs,
            max_tokens=doctor.max_token_length or 75,
            count_tokens=_counter(doctor),
            allow_uncaptioned=dataset.allow_uncaptioned,
            skip_corrupt=dataset.skip_corrupt,
        )
        read_config = functools.partial(
            read_dataset_config, dataset, captions, bucket_multiple=BUCKET_MULTIPLE, masked_loss=doctor.masked_loss
        )
        seen = collect(read_config, asked)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    findings = all_findings(seen)
    table = json.dumps(as_table(seen, findings), indent=2, ensure_ascii=False)
    if doctor.json == "-":
        print(json.dumps(as_table(seen, findings), indent=2))
    else:
        print(as_text(seen, findings))
    if doctor.json not in (None, "-"):
        Path(doctor.json).write_text(table + "\n", encoding="utf-8")
    if doctor.html is not None:
        Path(doctor.html).write_text(as_page(seen, findings), encoding="utf-8")
    return 3 if any(finding.severity is not Severity.NOTE for finding in findings) else 0


def _argv(words: Sequence[str] | None) -> list[str]:
    """A file that stands first, by itself, is the dataset file."""
    given = list(sys.argv[1:] if words is None else words)
    if given and not given[0].startswith("-"):
        return [f"--dataset_config={given[0]}", *given[1:]]
    return given


def _counter(doctor: DoctorFlags) -> Callable[[str], int] | None:
    """Counts tokens as the training will; None when no folder of tokenizers is given."""
    if doctor.tokenizer_cache_dir is None:
        return None
    hub_id, subfolder = V2_TOKENIZER if doctor.v2 else V1_TOKENIZER
    tokenizer = load_tokenizer(hub_id, subfolder, doctor.tokenizer_cache_dir)
    return lambda text: len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


if __name__ == "__main__":
    sys.exit(main())
