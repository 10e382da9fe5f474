"""How a run ends, above all when it does not come to its end: the last words and the exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from library.flags.settings import Settings
from library.train.exit_codes import ExitCode, RunError, is_out_of_memory
from library.train.interruption import Request
from library.train.out_of_memory import advice

logger = logging.getLogger(__name__)

CLOSING = {
    ExitCode.DATA: "images, captions or caches have to be mended first, as said above; "
    "python tools/check_dataset.py finds everything that is wrong with them",
    ExitCode.SETTINGS: "the settings have to be changed first, as said above",
    ExitCode.FAILED: "the run cannot go on until that is mended",
}
"""The last line below a message of several lines."""


@dataclass(frozen=True)
class Ending:
    """How a run ended, in a few words."""

    text: str = "finished"
    is_failure: bool = False

    @staticmethod
    def failed(error: BaseException) -> Ending:
        """A run that `error` ended; its first line says why."""
        lines = str(error).splitlines() or [""]
        return Ending(f"failed: {lines[0] or type(error).__name__}", is_failure=True)


def ending_of(request: Request, ends_early: bool, step: int) -> Ending:
    """How a run ends that nothing has failed in: as the user asked, by its validation loss, or with its last step."""
    if request.ends_run:
        asked = "interrupted" if request is Request.INTERRUPT else "stopped"
        return Ending(f"{asked} after step {step}; everything was saved, and --resume goes on from there")
    if ends_early:
        return Ending(f"ended after step {step}, since the validation loss fell no more (--early_stop_patience)")
    return Ending()


def exit_code_of(run: Callable[[], None], settings: Settings) -> ExitCode:
    """Run, say in the end what went wrong and what to do, and return the exit code.

    Only what is a mistake of ours comes out as the exception that it is.
    """
    try:
        run()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except (ValueError, OSError) as error:
        code = error.code if isinstance(error, RunError) else ExitCode.FAILED
        _say(str(error), code)
        return code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say(advice(settings, error), ExitCode.MEMORY)
        return ExitCode.MEMORY
    return ExitCode.DONE


def _say(message: str, code: ExitCode) -> None:
    """The whole message, and below a long one a line that stands by itself."""
    logger.error("%s", message, exc_info=logger.isEnabledFor(logging.DEBUG))
    if "\n" in message and code in CLOSING:
        logger.error("%s", CLOSING[code])
