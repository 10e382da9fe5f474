"""The recorded combinations of settings as command lines, and how each should end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """Words of a command line, and how far they come."""

    row: str
    words: str
    """`{name}` is a dataset file of `DATASETS`, `{folder}` the folder they lie in."""
    end: str
    """refused: a mistake in the settings; warned: a warning about them; stops: the images are refused;
    said: a message of a run that has read them; silent: taken without a word."""
    message: str = ""
    scripts: tuple[str, ...] = ()
    """Of those that the row is about; all of them unless given."""
    implies: Mapping[str, Any] | None = None
    """Values that follow, or that stay."""
    without: str = "-"
    """A flag that is left out."""


NETWORKS = ("sd", "sdxl", "lllite", "train_db")
"""Of Stable Diffusion, which learns to predict noise or velocity."""
FLOW = ("flux",)
NO_EFFECT = "has no effect"
CACHED = "--cache_text_encoder_outputs --network_train_unet_only"
CACHED_PAIRS = "--cache_text_encoder_outputs"
CHANGING = (
    "cache_text_encoder_outputs with shuffle_caption, caption_dropout_rate > 0, token_warmup_step > 0 or "
    "caption_tag_dropout_rate > 0"
)
TWO_OPTIMIZERS = "use_8bit_adam with use_lion_optimizer, or either with optimizer_type"
FUSED = "fused_backward_pass with another optimizer than Adafactor, or accumulation > 1"
WARM_UP = "lr_warmup_steps != 0 with constant, adafactor or lr_scheduler_type"
NO_IMAGES_TWICE = "dataset_config plus train_data_dir, reg_data_dir or in_json"
CHANGING_PIXELS = "cache_latents with color_aug or random_crop in any subset"
STORED = "fp8_base or fp8_base_unet with mixed_precision no"

CASES = (
    Case(
        "cache_latents_to_disk without cache_latents",
        "--cache_latents_to_disk",
        "warned",
        "--cache_latents_to_disk switches --cache_latents on",
        implies={"cache_latents": True},
    ),
    Case(
        "adaptive_noise_scale without noise_offset",
        "--adaptive_noise_scale=0.1",
        "refused",
        "--adaptive_noise_scale needs --noise_offset",
        NETWORKS,
    ),
    Case("adaptive_noise_scale without noise_offset", "--adaptive_noise_scale=0.1", "warned", NO_EFFECT, FLOW),
    Case(
        "scale_v_pred_loss_like_noise_pred without v_parameterization",
        "--scale_v_pred_loss_like_noise_pred",
        "refused",
        "--scale_v_pred_loss_like_noise_pred needs --v_parameterization",
        NETWORKS,
    ),
    Case(
        "scale_v_pred_loss_like_noise_pred without v_parameterization",
        "--scale_v_pred_loss_like_noise_pred",
        "warned",
        NO_EFFECT,
        FLOW,
    ),
    Case(
        "v_pred_like_loss with v_parameterization",
        "--v_pred_like_loss=0.1 --v_parameterization",
        "refused",
        "--v_pred_like_loss .* leave it or --v_parameterization out",
        NETWORKS,
    ),
    Case(
        "v_pred_like_loss with v_parameterization",
        "--v_pred_like_loss=0.1 --v_parameterization",
        "warned",
        "--v_pred_like_loss has no effect",
        FLOW,
    ),
    Case(
        "zero_terminal_snr without v_parameterization",
        "--zero_terminal_snr",
        "warned",
        "--zero_terminal_snr is made for models that predict velocity",
        NETWORKS,
    ),
    Case("zero_terminal_snr without v_parameterization", "--zero_terminal_snr", "warned", NO_EFFECT, FLOW),
    Case("v2 with clip_skip", "--v2 --clip_skip=2", "warned", "--clip_skip=2 is unusual", ("sd", "train_db")),
    Case("v2 with clip_skip", "--v2 --clip_skip=2", "refused", "--v2 is for Stable", ("sdxl", "lllite")),
    Case("v2 with clip_skip", "--v2 --clip_skip=2", "warned", "--v2, --clip_skip have no effect", FLOW),
    Case(CHANGING_PIXELS, "--cache_latents --random_crop", "refused", "--random_crop needs the pixels"),
    Case(CHANGING_PIXELS, "--cache_latents --color_aug", "refused", "--color_aug needs the pixels"),
    Case(CHANGING_PIXELS, "--cache_latents --dataset_config={random_crop}", "stops", "random_crop cannot be used"),
    Case(CHANGING_PIXELS, "--cache_latents --dataset_config={color_aug}", "stops", "color_aug cannot be used"),
    *(
        Case(
            "bucket_reso_steps not a multiple of 64",
            f"--dataset_config={{buckets_{steps}}}",
            "stops",
            f"bucket_reso_steps = {steps}; expected a multiple of 64",
            ("sd", "train_db"),
        )
        for steps in (32, 48)
    ),
    Case(
        "bucket_reso_steps not a multiple of 64",
        "--dataset_config={buckets_48}",
        "stops",
        "bucket_reso_steps = 48; expected a multiple of 32",
        FLOW,
    ),
    # What its models need, as the row's note says.
    Case("bucket_reso_steps not a multiple of 64", "--dataset_config={buckets_32}", "said", "", FLOW),
    Case(
        "bucket_reso_steps not a multiple of 32",
        "--dataset_config={buckets_48}",
        "stops",
        "bucket_reso_steps = 48; expected a multiple of 32",
    ),
    Case(
        "full_fp16 without mixed_precision fp16", "--full_fp16", "refused", "--full_fp16 needs --mixed_precision=fp16"
    ),
    Case(
        "full_bf16 without mixed_precision bf16", "--full_bf16", "refused", "--full_bf16 needs --mixed_precision=bf16"
    ),
    Case("deepspeed in train_db", "--deepspeed --zero_stage=1", "silent", implies={"deepspeed": True}),
    Case(STORED, "--fp8_base", "refused", "--fp8_base and --fp8_base_unet .* --mixed_precision=bf16"),
    Case(STORED, "--fp8_base_unet", "refused", "--fp8_base and --fp8_base_unet .* --mixed_precision=bf16"),
    # Either rounds the transformer; with this one text encoders stay in 16 bits.
    Case("fp8_base_unet", "--fp8_base_unet --mixed_precision=bf16", "silent", implies={"fp8_base_unet": True}),
    Case("v2", "--v2", "refused", "--v2 is for Stable Diffusion 2.x"),
    Case("clip_skip given", "--clip_skip=2", "warned", "--clip_skip has no effect: .* both of its text encoders"),
    Case(
        "cache_text_encoder_outputs_to_disk without cache_text_encoder_outputs",
        "--network_train_unet_only --cache_text_encoder_outputs_to_disk",
        "warned",
        "--cache_text_encoder_outputs_to_disk switches --cache_text_encoder_outputs on",
        ("sdxl", "flux"),
        implies={"cache_text_encoder_outputs": True},
    ),
    Case(
        "cache_text_encoder_outputs_to_disk without cache_text_encoder_outputs",
        "--cache_text_encoder_outputs_to_disk",
        "warned",
        "--cache_text_encoder_outputs_to_disk switches --cache_text_encoder_outputs on",
        ("lllite",),
        implies={"cache_text_encoder_outputs": True},
    ),
    *(
        Case(CHANGING, f"{cached} --dataset_config={{{name}}}", end, message, scripts)
        for cached, scripts in ((CACHED, ("sdxl", "flux")), (CACHED_PAIRS, ("lllite",)))
        for name, end, message in (
            ("shuffle", "stops", "shuffle_caption would be drawn once .* --text_cache_variants"),
            ("tag_dropout", "stops", "caption_tag_dropout_rate would be drawn once .* --text_cache_variants"),
            ("warm_up", "stops", "token_warmup_step .* cannot be used with cached text"),
            ("dropout", "said", ""),  # the answer to an empty caption is kept too
        )
    ),
    Case(
        "cache_text_encoder_outputs without network_train_unet_only",
        "--cache_text_encoder_outputs",
        "refused",
        "--cache_text_encoder_outputs needs --network_train_unet_only",
    ),
    Case(
        "T5 training (network arg) with cache_text_encoder_outputs",
        "--network_args train_t5xxl=True --cache_text_encoder_outputs",
        "refused",
        "train_t5xxl=True trains T5-XXL, whose answers --cache_text_encoder_outputs keeps",
    ),
    Case(
        "model_type chroma without apply_t5_attn_mask",
        "--model_type=chroma",
        "warned",
        "--model_type=chroma switches --apply_t5_attn_mask on",
        implies={"apply_t5_attn_mask": True},
    ),
    Case("max_token_length given", "--max_token_length=150", "warned", "--max_token_length has no effect"),
    # Both work together.
    Case(
        "blocks_to_swap > 0 with cpu_offload_checkpointing",
        "--blocks_to_swap=2 --gradient_checkpointing --cpu_offload_checkpointing",
        "silent",
        implies={"blocks_to_swap": 2, "cpu_offload_checkpointing": True},
    ),
    Case("split_mode", "--split_mode", "warned", "--split_mode .* --blocks_to_swap=18", implies={"blocks_to_swap": 18}),
    # It works: the threshold follows the noise level.
    Case(
        "huber or smooth_l1 with huber_schedule snr (the default)",
        "--loss_type=huber",
        "silent",
        implies={"huber_schedule": "snr"},
    ),
    Case(
        "weighted_captions with live text encoding",
        "--weighted_captions",
        "refused",
        "--weighted_captions: T5-XXL has no weights of words",
    ),
    Case(TWO_OPTIMIZERS, "--use_8bit_adam --use_lion_optimizer", "refused", "--use_8bit_adam and --use_lion_optimizer"),
    Case(TWO_OPTIMIZERS, "--use_8bit_adam --optimizer_type=AdamW", "refused", "--use_8bit_adam and --optimizer_type"),
    Case(TWO_OPTIMIZERS, "--use_lion_optimizer --optimizer_type=Lion", "refused", "--use_lion_optimizer and --optim"),
    Case(FUSED, "--fused_backward_pass", "refused", "--fused_backward_pass needs --optimizer_type=Adafactor"),
    Case(
        FUSED,
        "--fused_backward_pass --optimizer_type=Adafactor --gradient_accumulation_steps=2",
        "refused",
        "--fused_backward_pass keeps no gradient to add to: leave it or --gradient_accumulation_steps=2 out",
    ),
    *(
        Case(WARM_UP, f"--lr_warmup_steps=10 {words}", "refused", "--lr_warmup_steps=10 has no meaning for this sched")
        for words in ("", "--lr_scheduler=adafactor", "--lr_scheduler=cosine --lr_scheduler_type=a.B")
    ),
    Case(
        "initial start step >= max_train_steps", "--initial_step=2", "stops", "after step 2, but it has 2 steps: raise"
    ),
    Case("network_module missing", "", "refused", "--network_module is missing", without="network_module"),
    Case("dim_from_weights without network_weights", "--dim_from_weights", "refused", "needs --network_weights"),
    *(
        Case(
            "log_with tensorboard or all without logging_dir",
            f"--log_with={trackers}",
            "refused",
            f"--log_with={trackers} needs --logging_dir",
        )
        for trackers in ("tensorboard", "all")
    ),
    Case(
        "log_with wandb without the package", "--log_with=wandb", "refused", "--log_with=wandb needs the package wandb"
    ),
    # As many workers as are asked for; a process without others needs no launcher.
    Case("deepspeed", "--deepspeed --max_data_loader_n_workers=3", "silent", implies={"max_data_loader_n_workers": 3}),
    Case(
        "persistent_data_loader_workers with 0 workers",
        "--persistent_data_loader_workers --max_data_loader_n_workers=0",
        "refused",
        "--persistent_data_loader_workers needs --max_data_loader_n_workers=1 or more",
    ),
    Case("no images found", "--dataset_config={no_images}", "stops", "no training images were found"),
    *(
        Case(NO_IMAGES_TWICE, f"--{name}={{{place}}}", "warned", f"--{name} is ignored: --dataset_config says")
        for name, place in (("train_data_dir", "folder"), ("in_json", "plain"))
    ),
    Case(
        NO_IMAGES_TWICE,
        "--reg_data_dir={folder}",
        "warned",
        "--reg_data_dir is ignored: --dataset_config says",
        ("sd", "sdxl", "flux", "train_db"),
    ),
    Case(NO_IMAGES_TWICE, "--reg_data_dir={folder}", "refused", "--reg_data_dir is not a flag", ("lllite",)),
    # Folders with masks beside the images work like every other dataset.
    Case(
        "masked_loss in train_db",
        "--masked_loss --dataset_config={masks}",
        "said",
        "pictures: masks in .*edges weigh the loss",
    ),
    # Both models are trained in one step, so accumulation is exact.
    Case(
        "gradient_accumulation_steps > 1",
        "--gradient_accumulation_steps=2",
        "silent",
        implies={"gradient_accumulation_steps": 2},
    ),
    *(
        Case(
            "sample_every_n_steps/epochs <= 0",
            f"--sample_every_n_{unit}={number}",
            "warned",
            f"--sample_every_n_{unit}={number} makes no previews by {unit}",
            implies={f"sample_every_n_{unit}": None},
        )
        for unit, number in (("steps", 0), ("epochs", -1))
    ),
    Case(
        "cpu_offload_checkpointing with gradient_checkpointing",
        "--cpu_offload_checkpointing --gradient_checkpointing",
        "silent",
        implies={"cpu_offload_checkpointing": True},
    ),
    Case("debug_dataset", "--debug_dataset", "said", "one orange circle"),
)

HELD_BY = {
    "fp8 checkpoint in e5m2, e4m3fnuz or e5m2fnuz": (
        "memory.test_fp8.test_a_file_in_float8_is_used_as_it_is_without_scales_and_refused_with_them"
    ),
    "fp8_base_unet": ("train.test_memory.test_weights_in_float8_take_a_byte_each_and_the_run_learns_about_the_same"),
    "blocks_to_swap beyond the model limit": (
        "models.test_swap_groups.test_more_than_the_model_can_swap_is_an_error_that_says_how_many_it_can"
    ),
    "blocks_to_swap > 0 with cpu_offload_checkpointing": (
        "train.test_memory_flux.test_streaming_and_recomputing_change_no_bit_of_the_result"
    ),
    "huber or smooth_l1 with huber_schedule snr (the default)": (
        "diffusion.test_flow.test_the_huber_threshold_of_snr_falls_from_one_to_huber_c_as_noise_grows"
    ),
    "scale_weight_norms with a network lacking support": (
        "train.test_combinations.test_weights_are_not_scaled_in_a_network_that_cannot_do_it"
    ),
    "cpu_offload_checkpointing with gradient_checkpointing": (
        "train.test_memory.test_what_is_recomputed_and_where_it_waits_changes_no_bit_of_the_result"
    ),
    "deepspeed": "train.test_deepspeed_updates.test_the_updates_are_those_of_a_run_without_deepspeed",
    "gradient_accumulation_steps > 1": (
        "train.test_flat_parameters.test_adamw_on_flat_parameters_equals_adamw_on_each"
    ),
}
"""Rows that are about more than the settings and the images, or that end better than recorded -> the test of that."""

DATASETS = {
    "plain": "",
    "random_crop": "random_crop = true",
    "color_aug": "color_aug = true",
    "shuffle": "shuffle_caption = true",
    "tag_dropout": "caption_tag_dropout_rate = 0.1",
    "warm_up": "token_warmup_step = 5",
    "dropout": "caption_dropout_rate = 0.1",
    "no_images": "",
    "masks": "",
    "buckets_32": "",
    "buckets_48": "",
}
"""Name of a dataset file -> a line of its subset."""
