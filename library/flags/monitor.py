"""How a run is watched: preview pictures and validation."""

from dataclasses import dataclass

from library.flags.declare import flag


@dataclass(frozen=True)
class PreviewFlags:
    """Previews"""

    sample_every_n_steps: int | None = flag(None, "make previews after every n-th step")
    sample_at_first: bool = flag(False, "make previews before the first step too")
    sample_every_n_epochs: int | None = flag(None, "make previews after every n-th epoch; wins over steps")
    sample_prompts: str | None = flag(None, "file of prompts: .txt, .toml or .json", names="file")
    sample_sampler: str = flag(
        "ddim",
        "sampler of previews",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )


@dataclass(frozen=True)
class ValidationFlags:
    """Validation"""

    validation_seed: int | None = flag(
        None, "seed of which images are held out and of the noise they are judged with; that of the run unless given"
    )
    validation_split: float = flag(0.0, "part of the images held out for validation", at_least=0, at_most=1)
    validate_every_n_steps: int | None = flag(
        None, "validate after every n-th step, besides the ends of epochs", at_least=1
    )
    validate_every_n_epochs: int | None = flag(
        None, "validate after every n-th epoch; after each one unless given", at_least=1
    )
    max_validation_steps: int | None = flag(None, "batches of one validation; all unless given", at_least=1)
    early_stop_patience: int | None = flag(
        None, "end the run after this many validations in a row without a lower loss", at_least=1
    )
