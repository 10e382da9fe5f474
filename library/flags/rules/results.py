"""Which settings of logs, previews, files and uploads do not go together."""

import importlib.util

from library.flags.rules.rule import Consequence, Rule, Rules

RESULTS = Rules(
    mistakes=(
        Rule(
            "TensorBoard without a folder",
            lambda log_with, logging_dir: log_with in ("tensorboard", "all") and not logging_dir,
            "--log_with={log_with} needs --logging_dir, the folder for its files",
        ),
        Rule(
            "wandb is not installed",
            lambda log_with: log_with in ("wandb", "all") and importlib.util.find_spec("wandb") is None,
            "--log_with={log_with} needs the package wandb: pip install wandb",
        ),
        Rule(
            "nothing to resume from the hub",
            lambda resume_from_huggingface, resume: resume_from_huggingface and not resume,
            "--resume_from_huggingface needs --resume=owner/name/folder, where the state lies on the hub",
        ),
        Rule(
            "previews of nothing",
            lambda sample_every_n_steps, sample_every_n_epochs, sample_at_first, sample_prompts: bool(
                (sample_every_n_steps or sample_every_n_epochs or sample_at_first) and not sample_prompts
            ),
            "previews need --sample_prompts, a .txt, .toml or .json file of prompts",
        ),
    ),
    doubts=(
        Rule(
            "last epochs of none",
            lambda save_last_n_epochs, save_every_n_epochs, save_n_epoch_ratio: bool(
                save_last_n_epochs and not save_every_n_epochs and not save_n_epoch_ratio
            ),
            "--save_last_n_epochs has no effect without --save_every_n_epochs or --save_n_epoch_ratio",
        ),
        Rule(
            "last steps of none",
            lambda save_last_n_steps, save_every_n_steps: bool(save_last_n_steps and not save_every_n_steps),
            "--save_last_n_steps has no effect without --save_every_n_steps",
        ),
        Rule(
            "last states of none",
            lambda save_last_n_steps_state, save_last_n_epochs_state, save_state: bool(
                (save_last_n_steps_state or save_last_n_epochs_state) and not save_state
            ),
            "--save_last_n_steps_state and --save_last_n_epochs_state have no effect without --save_state",
        ),
        Rule(
            "uploads to nowhere",
            lambda huggingface_repo_id, save_state_to_huggingface, async_upload: bool(
                (save_state_to_huggingface or async_upload) and not huggingface_repo_id
            ),
            "--save_state_to_huggingface and --async_upload have no effect without --huggingface_repo_id",
        ),
    ),
    consequences=(
        Consequence(
            "previews every 0 steps",
            lambda sample_every_n_steps: sample_every_n_steps is not None and sample_every_n_steps <= 0,
            "sample_every_n_steps",
            None,
            "--sample_every_n_steps={sample_every_n_steps} makes no previews by steps",
        ),
        Consequence(
            "previews every 0 epochs",
            lambda sample_every_n_epochs: sample_every_n_epochs is not None and sample_every_n_epochs <= 0,
            "sample_every_n_epochs",
            None,
            "--sample_every_n_epochs={sample_every_n_epochs} makes no previews by epochs",
        ),
    ),
)
