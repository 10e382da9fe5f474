"""Which settings of the model, the network, the loss and the optimizer do not go together."""

import importlib.util

from library.flags.rules.rule import Rule, Rules

WITHOUT_WARMUP = ("constant", "adafactor")

TRAINING = Rules(
    mistakes=(
        Rule(
            "adaptive_noise_scale without noise_offset",
            lambda adaptive_noise_scale, noise_offset: adaptive_noise_scale is not None and noise_offset is None,
            "--adaptive_noise_scale needs --noise_offset, which it changes",
        ),
        Rule(
            "velocity loss scaling without v_parameterization",
            lambda scale_v_pred_loss_like_noise_pred, v_parameterization: (
                scale_v_pred_loss_like_noise_pred and not v_parameterization
            ),
            "--scale_v_pred_loss_like_noise_pred needs --v_parameterization",
        ),
        Rule(
            "v_pred_like_loss with v_parameterization",
            lambda v_pred_like_loss, v_parameterization: bool(v_pred_like_loss and v_parameterization),
            "--v_pred_like_loss is for models that predict noise; leave it or --v_parameterization out",
        ),
        Rule(
            "timestep limits crossed",
            lambda min_timestep, max_timestep: (0 if min_timestep is None else min_timestep) >= (max_timestep or 1000),
            "--min_timestep={min_timestep} leaves no timestep below --max_timestep={max_timestep}",
        ),
        Rule(
            "full_fp16 without fp16",
            lambda full_fp16, mixed_precision: full_fp16 and mixed_precision != "fp16",
            "--full_fp16 needs --mixed_precision=fp16, which is {mixed_precision}",
        ),
        Rule(
            "full_bf16 without bf16",
            lambda full_bf16, mixed_precision: full_bf16 and mixed_precision != "bf16",
            "--full_bf16 needs --mixed_precision=bf16, which is {mixed_precision}",
        ),
        Rule(
            "warm-up with a schedule that has none",
            lambda lr_warmup_steps, lr_scheduler, lr_scheduler_type: (
                lr_warmup_steps != 0 and (bool(lr_scheduler_type) or lr_scheduler.partition(":")[0] in WITHOUT_WARMUP)
            ),
            "--lr_warmup_steps={lr_warmup_steps} has no meaning for this schedule: "
            "choose --lr_scheduler=constant_with_warmup (or cosine, linear, ...), or --lr_warmup_steps=0",
        ),
        Rule(
            "updates during backward with another optimizer than Adafactor",
            lambda fused_backward_pass, optimizer_type: bool(
                fused_backward_pass and optimizer_type.lower() != "adafactor"
            ),
            "--fused_backward_pass needs --optimizer_type=Adafactor: others look at all gradients at once",
        ),
        Rule(
            "updates during backward with accumulation",
            lambda fused_backward_pass, gradient_accumulation_steps: (
                fused_backward_pass and gradient_accumulation_steps > 1
            ),
            "--fused_backward_pass keeps no gradient to add to: leave it or "
            "--gradient_accumulation_steps={gradient_accumulation_steps} out",
        ),
        Rule(
            "updates during backward with scaled losses",
            lambda fused_backward_pass, mixed_precision: fused_backward_pass and mixed_precision == "fp16",
            "--fused_backward_pass cannot skip a step whose gradients overflow, as {mixed_precision} needs: "
            "use --mixed_precision=bf16",
        ),
        Rule(
            "ranks from no file",
            lambda dim_from_weights, network_weights: dim_from_weights and not network_weights,
            "--dim_from_weights needs --network_weights, the file to take ranks from",
        ),
        Rule(
            "nothing left to train",
            lambda network_train_unet_only, network_train_text_encoder_only: (
                network_train_unet_only and network_train_text_encoder_only
            ),
            "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train; keep one",
        ),
        Rule(
            "more multipliers than base weights",
            lambda base_weights, base_weights_multiplier: len(base_weights_multiplier or ()) > len(base_weights or ()),
            "--base_weights_multiplier has more numbers than --base_weights has files",
        ),
        Rule(
            "xformers is not installed",
            lambda xformers: xformers and importlib.util.find_spec("xformers") is None,
            "--xformers needs the package xformers: pip install xformers, or use --sdpa",
        ),
    ),
    doubts=(
        Rule(
            "zero_terminal_snr without v_parameterization",
            lambda zero_terminal_snr, v_parameterization: zero_terminal_snr and not v_parameterization,
            "--zero_terminal_snr is made for models that predict velocity (--v_parameterization); "
            "a model that predicts noise learns nothing at the last step",
        ),
        Rule(
            "clip_skip with v2",
            lambda v2, clip_skip: v2 and clip_skip is not None,
            "--clip_skip={clip_skip} is unusual for Stable Diffusion 2.x, whose own choice is the second from the end",
        ),
        Rule(
            "several attentions",
            lambda mem_eff_attn, xformers, sdpa: mem_eff_attn + xformers + sdpa > 1,
            "of several attentions one is used: --mem_eff_attn before --xformers before --sdpa",
        ),
        Rule(
            "random strength of no noise offset",
            lambda noise_offset_random_strength, noise_offset: noise_offset_random_strength and not noise_offset,
            "--noise_offset_random_strength has no effect without --noise_offset",
        ),
        Rule(
            "random strength of no input noise",
            lambda ip_noise_gamma_random_strength, ip_noise_gamma: (
                ip_noise_gamma_random_strength and not ip_noise_gamma
            ),
            "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma",
        ),
    ),
)
