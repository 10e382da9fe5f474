"""Encode the images of a training into files beside them: `accelerate launch tools/cache_latents.py <its flags>`.

The training then finds every file valid and never loads the VAE for it. Several processes share the work; a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache_families import CACHE_LATENTS, FamilyFlags
from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = CACHE_LATENTS.settings((__doc__ or "").splitlines()[0])
    set_up_logging(settings[LoggingFlags], settings.warnings)

from library.models.flux.architecture import Flux
from library.models.sd.architecture import StableDiffusion
from library.models.sdxl.architecture import Sdxl
from library.train.caches import fill_all_latents, run_cache_tool

if __name__ == "__main__":
    family = settings[FamilyFlags]
    architecture = Flux if family.flux else Sdxl if family.sdxl else StableDiffusion
    sys.exit(run_cache_tool(settings, architecture, fill_all_latents))
