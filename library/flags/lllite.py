"""Training a ControlNet-LLLite: which flags its script has of its own, and which shared ones have no place there."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.flags.declare import flag
from library.flags.rules.rule import Rule, Rules
from library.flags.trainers import TRAINER, WITH_TEXT_CACHE


@dataclass(frozen=True)
class LlliteFlags:
    """ControlNet-LLLite"""

    cond_emb_dim: int | None = flag(
        None, "channels of the conditioning image's embedding (32, or those of network_weights, unless given)",
        at_least=2,
    )  # fmt: skip
    network_dim: int | None = flag(
        None, "width of each small network inside (64, or that of network_weights, unless given)", at_least=1
    )
    network_dropout: float | None = flag(
        None, "probability of dropping each value inside while training", at_least=0, at_most=1
    )
    network_weights: str | None = flag(None, "ControlNet-LLLite file to start from", names="file")


TRAIN_LLLITE: tuple[type, ...] = (LlliteFlags, *TRAINER, *WITH_TEXT_CACHE)

LLLITE_IDLE: Mapping[str, str] = {
    "alpha_mask": "image pairs are learnt as a whole",
}
"""Flags without effect here, and why."""

NO_REGULARISATION = "every image of this training has a conditioning image, so there are no regularisation images"
LLLITE_ABSENT: Mapping[str, str] = {
    "unet_lr": "the network is trained with --learning_rate",
    "text_encoder_lr": "no text encoder is trained; the network's rate is --learning_rate",
    "masked_loss": "the images in conditioning_data_dir are what the network follows, not masks",
    "reg_data_dir": NO_REGULARISATION,
    "prior_loss_weight": NO_REGULARISATION,
    "no_metadata": "the file holds no description of its training; modelspec entries are always there",
    "training_comment": "the file holds no description of its training; there is --metadata_description",
}
"""Flags of shared groups that this script does not take, and what to do instead."""

LLLITE_RULES = Rules(
    mistakes=(
        Rule(
            "captions from a metadata file",
            lambda in_json, dataset_config: bool(in_json and not dataset_config),
            "--in_json is not for image pairs: give --train_data_dir with caption files, and --conditioning_data_dir",
        ),
        Rule(
            "images without conditioning images",
            lambda train_data_dir, conditioning_data_dir, dataset_config, in_json: bool(
                train_data_dir and not conditioning_data_dir and not dataset_config and not in_json
            ),
            "--conditioning_data_dir is missing: the folder with a second image for each in --train_data_dir, "
            "of the same name",
        ),
        Rule(
            "random crops of pairs",
            lambda random_crop: random_crop,
            "--random_crop cannot be used with conditioning images: both images are cut in the middle",
        ),
    ),
)
