from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from library.flags.rules.every_run import EVERY_RUN
from library.flags.rules.rule import Consequence, Rule, Rules, broken, under
from library.flags.rules.sharding import SHARDING
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]

MISTAKES = {
    "adaptive_noise_scale without noise_offset": "--adaptive_noise_scale=0.1",
    "velocity loss scaling without v_parameterization": "--scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss with v_parameterization": "--v_pred_like_loss=0.1 --v_parameterization",
    "timestep limits crossed": "--min_timestep=500 --max_timestep=500",
    "cached latents with random crops": "--cache_latents --random_crop",
    "cached latents with changing colours": "--cache_latents --color_aug",
    "cached latents with crops around faces": "--cache_latents --face_crop_aug_range=1,3",
    "two sources of images": "--dataset_class=mine.Images",
    "full_fp16 without fp16": "--full_fp16 --mixed_precision=bf16",
    "full_bf16 without bf16": "--full_bf16",
    "warm-up with a schedule that has none": "--lr_warmup_steps=10",
    "updates during backward with another optimizer than Adafactor": "--fused_backward_pass",
    "updates during backward with accumulation": (
        "--fused_backward_pass --optimizer_type=Adafactor --gradient_accumulation_steps=2"
    ),
    "updates during backward with scaled losses": (
        "--fused_backward_pass --optimizer_type=adafactor --mixed_precision=fp16"
    ),
    "ranks from no file": "--dim_from_weights",
    "nothing left to train": "--network_train_unet_only --network_train_text_encoder_only",
    "more multipliers than base weights": "--base_weights_multiplier 0.5",
    "TensorBoard without a folder": "--log_with=tensorboard",
    "wandb is not installed": "--log_with=wandb",
    "xformers is not installed": "--xformers",
    "nothing to resume from the hub": "--resume_from_huggingface",
    "previews of nothing": "--sample_every_n_epochs=1",
    "float8 without mixed precision": "--fp8_base",
    "merging into float8": f"--fp8_base_unet --mixed_precision=bf16 --base_weights {__file__}",
    "LyCORIS on float8": "--fp8_base --mixed_precision=bf16 --network_module=lycoris.kohya",
    "offloading without recomputation": "--cpu_offload_checkpointing",
    "persistent workers without workers": "--persistent_data_loader_workers --max_data_loader_n_workers=0",
}
ALLOWED = [
    "--adaptive_noise_scale=0.1 --noise_offset=0.05",
    "--scale_v_pred_loss_like_noise_pred --v_parameterization",
    "--v_pred_like_loss=0.1",
    "--min_timestep=0 --max_timestep=1",
    "--min_timestep=999",
    "--cache_latents",
    "--face_crop_aug_range=1.0,3.0",
    "--full_fp16 --mixed_precision=fp16",
    "--full_bf16 --mixed_precision=bf16",
    "--lr_warmup_steps=10 --lr_scheduler=constant_with_warmup",
    "--lr_warmup_steps=0",
    "--fused_backward_pass --optimizer_type=AdaFactor --mixed_precision=bf16",
    "--fp8_base --mixed_precision=bf16",
    "--fp8_base --mixed_precision=bf16 --network_module=lycoris.kohya --network_args bypass_mode=True",
    "--cpu_offload_checkpointing --gradient_checkpointing",
    "--cpu_offload_checkpointing --activation_memory=auto",
    "--activation_memory=3.5 --torch_compile --dynamo_backend=eager",
    "--log_with=tensorboard --logging_dir=logs",
    "--persistent_data_loader_workers",
]
DOUBTS = {
    "crops around faces with buckets": "--face_crop_aug_range=1,3 --enable_bucket",
    "zero_terminal_snr without v_parameterization": "--zero_terminal_snr",
    "clip_skip with v2": "--v2 --clip_skip=2",
    "several attentions": "--sdpa --mem_eff_attn",
    "planned and full recomputation": "--activation_memory=2 --gradient_checkpointing",
    "random strength of no noise offset": "--noise_offset_random_strength",
    "random strength of no input noise": "--ip_noise_gamma_random_strength",
    "last epochs of none": "--save_last_n_epochs=2",
    "last steps of none": "--save_last_n_steps=2",
    "last states of none": "--save_last_n_steps_state=2",
    "uploads to nowhere": "--async_upload",
    "flags of ZeRO 3": "--deepspeed --zero3_init_flag",
    "a folder for weights that stay": "--deepspeed --offload_param_nvme_path=disk",
    "DeepSpeed's flags without it": "--zero_stage=3",
    "DeepSpeed's other flags without it": "--zero3_init_flag",
}
DIVIDED = {
    "divided weights": "--zero_stage=3",
    "optimizer state on a disk": "--offload_optimizer_device=nvme --offload_optimizer_nvme_path=state",
    "weights elsewhere": "--offload_param_device=cpu",
    "offloading what is not divided": "--offload_optimizer_device=cpu --zero_stage=0",
    "master weights in fp16": "--fp16_master_weights_and_gradients",
    "DeepSpeed with scaled losses": "--mixed_precision=fp16",
    "DeepSpeed with weights in 16 bits": "--full_bf16 --mixed_precision=bf16",
    "DeepSpeed and updates during backward": "--fused_backward_pass --optimizer_type=Adafactor --zero_stage=0",
    "parts of tensors for an optimizer of whole ones": "--optimizer_type=Prodigy",
    "8-bit optimizers on the CPU": "--offload_optimizer_device=cpu --optimizer_type=AdamW8bit",
    "scaling weights that are divided": "--scale_weight_norms=1",
    "arguments that need whole gradients": "--network_args module_dropout=0.1",
    "an optimizer that DeepSpeed replaces": "--optimizer_type=torch.optim.Adagrad --zero_stage=1",
}
"""Mistakes beside --deepspeed."""
MISSING = {"DeepSpeed is not installed", "DeepSpeed and an early end of the text encoder"}  # below
MISSING |= {"no base model", "no network module", "no output folder", "no dataset"}  # test_settings
MISSING |= {"a file of DeepSpeed's own"}  # test_deepspeed_launcher
MISSING |= {"folder without resolution", "conditioning images without images"}  # below
MISSING |= {rule.name for rule in SHARDING.mistakes}  # test_sharding_rules


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def start(rules: tuple[Rule, ...], name: str) -> str:
    """The part of a rule's message before any value."""
    (message,) = (rule.message for rule in rules if rule.name == name)
    return message.partition("{")[0]


@pytest.mark.usefixtures("no_extras")
@pytest.mark.parametrize("name", MISTAKES)
def test_settings_that_do_not_go_together_are_refused(refused: Refused, base: list[str], name: str) -> None:
    (mistake,) = refused(*base, *MISTAKES[name].split())
    assert mistake.startswith(start(EVERY_RUN.mistakes, name))


@pytest.fixture
def with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "deepspeed" or None)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("name", DIVIDED)
def test_settings_that_deepspeed_cannot_follow_are_refused(refused: Refused, base: list[str], name: str) -> None:
    (mistake,) = refused(*base, "--deepspeed", *DIVIDED[name].split())
    assert mistake.startswith(start(EVERY_RUN.mistakes, name))


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize(
    "words",
    [
        "--zero_stage=1 --offload_optimizer_device=cpu --save_state",
        "--zero_stage=0 --optimizer_type=torch.optim.Adagrad --save_state_on_train_end",
        "--zero_stage=0 --save_state --scale_weight_norms=1 --optimizer_type=Prodigy --network_args module_dropout=0.1",
        "--optimizer_type=Lion8bit --mixed_precision=bf16 --ema_decay=0.99",
    ],
)
def test_settings_that_deepspeed_can_follow_are_accepted(read: Read, words: str) -> None:
    assert read("--deepspeed", *words.split()).warnings == ()


@pytest.mark.usefixtures("no_extras")
def test_deepspeed_needs_its_package(refused: Refused, base: list[str]) -> None:
    assert refused(*base, "--deepspeed") == ["--deepspeed needs the package deepspeed: pip install deepspeed"]


@pytest.mark.parametrize("steps", [5, 0])
def test_a_text_encoder_that_ends_early_is_not_for_deepspeed(steps: int) -> None:
    values = {"deepspeed": True, "stop_text_encoder_training": steps}
    assert len(broken(EVERY_RUN.mistakes, values)) == (steps > 0) + (importlib.util.find_spec("deepspeed") is None)


def test_conditioning_images_need_images(refused: Refused, base: list[str], tmp_path: Path) -> None:
    without = [word for word in base if not word.startswith("--train_data_dir")]
    mistakes = refused(*without, f"--conditioning_data_dir={tmp_path}")
    assert any(mistake.startswith("--conditioning_data_dir needs --train_data_dir") for mistake in mistakes)


def test_a_class_of_ones_own_needs_no_folder(base: list[str]) -> None:
    without = [word for word in base if not word.startswith("--train_data_dir")]
    assert read_settings(TRAIN_NETWORK, "a test", argv=[*without, "--dataset_class=mine.Images"]).warnings == ()


def test_folders_need_a_resolution(refused: Refused, base: list[str]) -> None:
    without = [word for word in base if not word.startswith("--resolution")]
    (mistake,) = refused(*without)
    assert mistake.startswith(start(EVERY_RUN.mistakes, "folder without resolution"))


@pytest.mark.parametrize("words", ALLOWED)
def test_settings_that_go_together_are_taken(read: Read, words: str) -> None:
    assert read(*words.split()).warnings == ()


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("name", DOUBTS)
def test_doubtful_settings_are_taken_with_one_warning(read: Read, name: str) -> None:
    (warning,) = read(*DOUBTS[name].split()).warnings
    assert warning.startswith(start(EVERY_RUN.doubts, name))


def test_no_rule_is_left_untested() -> None:
    assert {rule.name for rule in EVERY_RUN.mistakes} == MISTAKES.keys() | DIVIDED.keys() | MISSING
    launcher = {"another accumulation for the launcher", "another clipping for the launcher"}  # as above
    assert {rule.name for rule in EVERY_RUN.doubts} == DOUBTS.keys() | launcher | {
        rule.name for rule in SHARDING.doubts
    }


def test_a_rule_is_left_out_when_it_reads_a_flag_that_is_not_there() -> None:
    rule = Rule("both", lambda a, b: a and b, "a={a}")
    assert broken([rule], {"a": 1, "b": 2}) == ["a=1"]
    assert broken([rule], {"a": 1}) == []
    assert broken([rule], {"a": 1, "b": 2}, failed={"b"}) == []


def test_rules_under_a_condition_hold_only_with_it() -> None:
    rules = under(lambda c: c == 3, Rule("a", lambda a: a == 1, "a and {c}"), Rule("always", lambda: True, "c"))
    assert broken(rules, {"a": 1, "c": 3}) == ["a and 3", "c"]
    assert broken(rules, {"a": 1, "c": 4}) == broken(rules, {"a": 1}) == []
    assert broken(rules, {"a": 1, "c": 3}, failed={"c"}) == []


def test_a_script_brings_rules_about_its_own_flags(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    own = Rules(
        mistakes=(Rule("no seed", lambda seed: seed == 2, "--seed={seed} is not to be used"),),
        doubts=(Rule("odd", lambda network_dim: network_dim == 3, "--network_dim={network_dim} is odd"),),
        consequences=(
            Consequence("seven", lambda seed: seed is None, "seed", 7, "--seed is 7"),
            Consequence("twice", lambda seed: seed == 7, "network_alpha", lambda seed: 2.0 * seed, "alpha follows"),
        ),
    )
    settings = read_settings(TRAIN_NETWORK, "a test", argv=[*base, "--network_dim=3"], rules=own)
    assert (settings.values()["seed"], settings.values()["network_alpha"]) == (7, 14.0)
    assert settings.warnings == ("--seed is 7", "alpha follows", "--network_dim=3 is odd")
    with pytest.raises(SystemExit):
        read_settings(TRAIN_NETWORK, "a test", argv=[*base, "--seed=2"], rules=own)
    assert "--seed=2 is not to be used" in capsys.readouterr().err
