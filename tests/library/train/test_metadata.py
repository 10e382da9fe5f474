from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest

from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.model import ModelFlags
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import MetadataFlags, OutputFlags
from library.flags.run import StepFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.metadata import (
    MINIMUM,
    RunFacts,
    at_save,
    dataset_resolution,
    file_metadata,
    minimum_metadata,
    start_hashing,
    training_metadata,
)

FACTS = json.loads((Path(__file__).parents[2] / "facts/metadata/lora_metadata.json").read_text(encoding="utf-8"))
ROWS = [row for row in FACTS["keys"] if "sd" in row["trainers"].split()]
WRITTEN_WITH_THE_WEIGHTS = {"sshs_model_hash", "sshs_legacy_hash"}

RUN = RunFacts(
    seed=42,
    num_batches_per_epoch=120,
    num_epochs=10,
    max_train_steps=1200,
    num_processes=2,
    session_id=2718281828,
    started_at=1700000000.25,
)
COMMON = {
    "ss_num_train_images": 240,
    "ss_num_reg_images": 0,
    "ss_tag_frequency": {"3_cat": {"cat": 12}},
    "ss_dataset_dirs": {"3_cat": {"n_repeats": 3, "img_count": 12}},
}
ONE_DATASET = COMMON | {
    "ss_reg_dataset_dirs": {},
    "ss_resolution": (512, 512),
    "ss_enable_bucket": True,
    "ss_bucket_no_upscale": False,
    "ss_min_bucket_reso": 256,
    "ss_max_bucket_reso": 1024,
    "ss_bucket_info": {"buckets": {"0": {"resolution": [512, 512], "count": 8}}, "mean_img_ar_error": 0.0},
}
SEVERAL = COMMON | {"ss_datasets": [{"is_dreambooth": True, "resolution": [512, 768]}, {"resolution": [256, 256]}]}


class SmallArchitecture:
    """Only what metadata asks of a model family."""

    version = "sd_v1"

    def base_model_version(self) -> str:
        return self.version

    def metadata(self) -> dict[str, str]:
        return {}

    def model_spec(self) -> Mapping[str, str]:
        return {
            "architecture": "stable-diffusion-v1",
            "implementation": "diffusers",
            "resolution": "512x512",
            "prediction_type": "epsilon",
        }


def architecture(version: str = "sd_v1") -> Architecture:
    small = SmallArchitecture()
    small.version = version
    return cast(Architecture, small)


def model_files(tmp_path: Path) -> ModelFlags:
    model, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    model.write_bytes(b"m" * 0x101000)
    vae.write_bytes(b"v")
    return ModelFlags(pretrained_model_name_or_path=str(model), vae=str(vae))


def full_metadata(settings: Settings, dataset_entries: Mapping[str, Any]) -> dict[str, str]:
    metadata = training_metadata(settings, architecture(), dataset_entries, RUN)
    return at_save(metadata, 600, 5, start_hashing(settings[ModelFlags]), 1700003600.5)


def expected_keys(*conditions: str) -> set[str]:
    return {row["key"] for row in ROWS if row["when"] in conditions} - WRITTEN_WITH_THE_WEIGHTS


ALWAYS = ("always", "full metadata only", "network_args given", "pretrained_model_name_or_path given")
MODELS = ("model path exists", "--vae given", "--vae given and exists")


def test_the_keys_of_a_run_with_a_dataset_file_are_the_recorded_ones(tmp_path: Path) -> None:
    network = NetworkFlags(network_module="networks.lora", network_args=("conv_dim=4",))
    config = DatasetFlags(dataset_config=tmp_path / "data.toml")
    found = full_metadata(Settings.of(model_files(tmp_path), network, config), SEVERAL)
    assert set(found) == expected_keys(*ALWAYS, *MODELS, "dataset_config given")


def test_the_keys_of_a_run_without_a_dataset_file_are_the_recorded_ones(tmp_path: Path) -> None:
    network = NetworkFlags(network_module="networks.lora", network_args=("conv_dim=4",))
    found = full_metadata(Settings.of(model_files(tmp_path), network), ONE_DATASET)
    assert set(found) == expected_keys(*ALWAYS, *MODELS, "no dataset_config")


def test_every_value_is_text_of_the_recorded_kind(tmp_path: Path) -> None:
    network = NetworkFlags(network_module="networks.lora", network_args=("conv_dim=4",))
    found = full_metadata(Settings.of(model_files(tmp_path), network), ONE_DATASET)
    assert all(isinstance(value, str) for value in found.values())
    kinds = {row["key"]: row["format"] for row in ROWS}
    for key, value in found.items():
        if kinds[key] == "json":
            json.loads(value)
        if kinds[key] == "bool":
            assert value in ("True", "False"), key
        if kinds[key] == "int":
            assert str(int(value)) == value, key


def test_values_are_written_as_recorded(tmp_path: Path) -> None:
    settings = Settings.of(
        model_files(tmp_path),
        NetworkFlags(network_module="networks.lora", network_dim=16, network_args=("conv_dim=4",)),
        OptimizerFlags(learning_rate=1e-4, text_encoder_lr=(5e-5,), optimizer_args=("weight_decay=0.1",)),
        SchedulerFlags(lr_scheduler="cosine", lr_warmup_steps=0.05),
        DatasetFlags(train_batch_size=2),
        CaptionFlags(keep_tokens=1),
        StepFlags(gradient_accumulation_steps=3),
        OutputFlags(output_name="my_lora", training_comment="first try"),
    )
    found = full_metadata(settings, ONE_DATASET)
    expected = {
        "ss_session_id": "2718281828",
        "ss_training_started_at": "1700000000.25",
        "ss_training_finished_at": "1700003600.5",
        "ss_output_name": "my_lora",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "None",
        "ss_text_encoder_lr": "5e-05",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "0.05",
        "ss_network_dim": "16",
        "ss_network_alpha": "1",
        "ss_network_args": '{"conv_dim": "4", "dropout": null}',
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "12",
        "ss_resolution": "(512, 512)",
        "ss_keep_tokens": "1",
        "ss_tag_frequency": '{"3_cat": {"cat": 12}}',
        "ss_num_validation_images": "0",
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": hashlib.sha256(b"m" * 0x1000).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(b"m" * 0x101000).hexdigest(),
        "ss_vae_hash": "e3b0c442",
        "ss_training_comment": "first try",
        "ss_steps": "600",
        "ss_epoch": "5",
    }
    assert {key: found[key] for key in expected} == expected


def test_several_text_encoder_rates_are_a_list() -> None:
    settings = Settings.of(OptimizerFlags(text_encoder_lr=(1e-5, 2e-5)))
    assert training_metadata(settings, architecture(), COMMON, RUN)["ss_text_encoder_lr"] == "[1e-05, 2e-05]"


def test_adafactor_with_its_own_rate_leaves_no_rate_of_the_flags() -> None:
    settings = Settings.of(OptimizerFlags(optimizer_type="Adafactor", learning_rate=1e-3, unet_lr=1e-4))
    found = training_metadata(settings, architecture(), COMMON, RUN)
    assert (found["ss_learning_rate"], found["ss_unet_lr"], found["ss_text_encoder_lr"]) == ("None", "None", "None")
    assert found["ss_lr_scheduler"] == "adafactor:0.001"


def test_a_second_version_model_says_so_without_the_flag() -> None:
    assert training_metadata(Settings.of(), architecture("sd_v2_v"), COMMON, RUN)["ss_v2"] == "True"


def test_a_hub_model_has_its_whole_name_and_no_hash() -> None:
    settings = Settings.of(ModelFlags(pretrained_model_name_or_path="some-owner/some-model"))
    found = full_metadata(settings, COMMON)
    assert found["ss_sd_model_name"] == "some-owner/some-model"
    assert "ss_sd_model_hash" not in found


def test_a_diffusers_folder_has_a_word_for_a_hash(tmp_path: Path) -> None:
    found = full_metadata(Settings.of(ModelFlags(pretrained_model_name_or_path=str(tmp_path))), COMMON)
    assert (found["ss_sd_model_hash"], found["ss_new_sd_model_hash"]) == ("IsADirectory", "IsADirectory")
    assert found["ss_sd_model_name"] == tmp_path.name


def test_without_metadata_only_what_loading_needs_stays() -> None:
    assert list(MINIMUM) == FACTS["minimum_keys"]
    network = NetworkFlags(network_module="networks.lora", network_dim=4)
    settings = Settings.of(network, OutputFlags(no_metadata=True, output_name="m"))
    metadata = training_metadata(settings, architecture(), COMMON, RUN)
    kept = file_metadata(settings, architecture(), metadata, {}, step=1, epoch=1)
    assert {key for key in kept if not key.startswith("modelspec.")} == set(MINIMUM) - {"ss_network_args"}
    assert minimum_metadata(metadata).items() <= kept.items()
    assert kept["modelspec.title"] == "m"


def test_a_file_holds_run_save_and_modelspec_entries() -> None:
    settings = Settings.of(OutputFlags(output_name="m"), MetadataFlags(metadata_author="A"), ModelFlags(clip_skip=2))
    metadata = training_metadata(settings, architecture(), COMMON, RUN)
    when = datetime(2024, 5, 6, 7, 8, 9)
    found = file_metadata(settings, architecture(), metadata, {}, step=30, epoch=2, resolution=(768, 512), time=when)
    assert (found["ss_steps"], found["ss_epoch"]) == ("30", "2")
    assert found["ss_training_finished_at"] == str(when.timestamp())
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.author"] == "A"
    assert found["modelspec.encoder_layer"] == "2"
    assert found["modelspec.resolution"] == "768x512"
    assert found["modelspec.date"] == "2024-05-06T07:08:09"
    assert "ss_steps" not in metadata


@pytest.mark.parametrize("as_json", [False, True])
def test_the_resolution_is_that_of_the_largest_dataset(as_json: bool) -> None:
    datasets: Any = json.dumps(SEVERAL["ss_datasets"]) if as_json else SEVERAL["ss_datasets"]
    assert dataset_resolution({"ss_datasets": datasets}) == (512, 768)
    assert dataset_resolution(COMMON) is None
