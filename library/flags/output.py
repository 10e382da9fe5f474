"""What a run writes: weights, metadata, logs."""

from dataclasses import dataclass

from library.flags.declare import flag
from library.flags.file_names import plain_name


@dataclass(frozen=True)
class OutputFlags:
    """Saving"""

    output_dir: str | None = flag(None, "folder for the result; made when missing")
    output_name: str | None = flag(None, "name of the result without its ending", parse=plain_name)
    save_precision: str | None = flag(
        None,
        "number format of the saved weights; that of training unless given",
        choices=(None, "float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = flag(None, "also save after every n-th epoch", at_least=1)
    save_every_n_steps: int | None = flag(None, "also save after every n-th step", at_least=1)
    save_n_epoch_ratio: int | None = flag(None, "also save about n times over the whole run", at_least=1)
    save_last_n_epochs: int | None = flag(None, "keep only the last n saved epochs", at_least=1)
    save_last_n_epochs_state: int | None = flag(
        None, "the same for states; as save_last_n_epochs unless given", at_least=1
    )
    save_last_n_steps: int | None = flag(None, "keep only what was saved in the last n steps", at_least=1)
    save_last_n_steps_state: int | None = flag(
        None, "the same for states; as save_last_n_steps unless given", at_least=1
    )
    save_state: bool = flag(False, "with every save, also save all that is needed to continue")
    save_state_on_train_end: bool = flag(False, "save what is needed to continue at the end only")
    resume: str | None = flag(None, "continue the run that saved this state folder")
    no_metadata: bool = flag(False, "leave out of the file what describes the training; what other programs need stays")
    save_model_as: str | None = flag(
        "safetensors", "file format of the result", choices=(None, "ckpt", "pt", "safetensors")
    )
    training_comment: str | None = flag(None, "any text, kept in the metadata")


@dataclass(frozen=True)
class MetadataFlags:
    """Model metadata (modelspec)"""

    metadata_title: str | None = flag(None, "title; output_name unless given")
    metadata_author: str | None = flag(None, "author")
    metadata_description: str | None = flag(None, "description")
    metadata_license: str | None = flag(None, "licence")
    metadata_tags: str | None = flag(None, "tags, separated by commas")
    metadata_usage_hint: str | None = flag(None, "how to use it")
    metadata_thumbnail: str | None = flag(None, "preview: an image file or a data: URL", names="thumbnail")
    metadata_merged_from: str | None = flag(None, "models it was merged from")
    metadata_trigger_phrase: str | None = flag(None, "words that call it up")
    metadata_preprocessor: str | None = flag(None, "what prepares its input")
    metadata_is_negative_embedding: str | None = flag(None, "whether it belongs in the negative prompt")


@dataclass(frozen=True)
class HubFlags:
    """Hugging Face hub"""

    huggingface_repo_id: str | None = flag(None, "upload what is saved to this repository, owner/name")
    huggingface_repo_type: str | None = flag(None, "kind of repository: model (unless given), dataset or space")
    huggingface_path_in_repo: str | None = flag(None, "folder in the repository")
    huggingface_token: str | None = flag(None, "access token; that of `hf auth login` unless given")
    huggingface_repo_visibility: str | None = flag(None, "public, or private (unless given), when it is made")
    save_state_to_huggingface: bool = flag(False, "upload states too")
    resume_from_huggingface: bool = flag(False, "take resume from the hub: owner/name/folder[:revision[:kind]]")
    async_upload: bool = flag(False, "upload while training goes on; the last upload is waited for")


@dataclass(frozen=True)
class EmaFlags:
    """Moving average"""

    ema_decay: float | None = flag(
        None, "also save a moving average of the trained weights, such as 0.999", at_least=0.0, at_most=1.0
    )


@dataclass(frozen=True)
class LoggingFlags:
    """Logging"""

    console_log_level: str | None = flag(
        None,
        "least important messages shown (INFO unless given)",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = flag(None, "write messages to this file instead of the console")
    console_log_simple: bool = flag(False, "messages without time and place")
    logging_dir: str | None = flag(None, "folder for TensorBoard logs; each run gets a subfolder with its time")
    log_with: str | None = flag(
        None,
        "where losses and rates go (tensorboard when logging_dir is given)",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = flag(None, "text before the time in the name of the run's log folder")
    log_tracker_name: str | None = flag(None, "name of the project in the tracker (network_train unless given)")
    wandb_run_name: str | None = flag(None, "name of the run in wandb")
    log_tracker_config: str | None = flag(
        None, "TOML file with arguments for the tracker's start; replaces wandb_run_name", names="file"
    )
    wandb_api_key: str | None = flag(None, "key to log in to wandb")
    log_config: bool = flag(False, "log the settings too, without keys and paths")
