"""Which settings of memory do not go together."""

from collections.abc import Sequence

from library.flags.rules.rule import Consequence, Rule, Rules


def calculates_with_weights(network_module: str | None, network_args: Sequence[str] | None) -> bool:
    """Whether it is a network of LyCORIS that changes the weights themselves, which it does unless told to bypass."""
    bypasses = any(pair.lower() in ("bypass_mode=true", "bypass_mode=1") for pair in network_args or ())
    return (network_module or "").partition(".")[0] == "lycoris" and not bypasses


NO_FLOAT8 = "calculates with the weights, not in float8: add bypass_mode=True to --network_args, or leave float8 out"

MEMORY = Rules(
    mistakes=(
        Rule(
            "float8 without mixed precision",
            lambda fp8_base, fp8_base_unet, mixed_precision: (fp8_base or fp8_base_unet) and mixed_precision == "no",
            "--fp8_base and --fp8_base_unet are for storing: what is calculated with them is said by "
            "--mixed_precision=bf16 (fp16 on older GPUs)",
        ),
        Rule(
            "merging into float8",
            lambda base_weights, fp8_base, fp8_base_unet: bool(base_weights and (fp8_base or fp8_base_unet)),
            "--base_weights cannot be added to weights in float8: leave --fp8_base and --fp8_base_unet out, "
            "or give a model that they are merged into already",
        ),
        Rule(
            "LyCORIS on float8",
            lambda network_module, network_args, fp8_base, fp8_base_unet: (
                (fp8_base or fp8_base_unet) and calculates_with_weights(network_module, network_args)
            ),
            "--network_module={network_module} " + NO_FLOAT8,
        ),
        Rule(
            "offloading without recomputation",
            lambda cpu_offload_checkpointing, gradient_checkpointing, activation_memory: (
                cpu_offload_checkpointing and not gradient_checkpointing and activation_memory is None
            ),
            "--cpu_offload_checkpointing needs --gradient_checkpointing, whose inputs it puts into main memory",
        ),
    ),
    doubts=(
        Rule(
            "planned and full recomputation",
            lambda activation_memory, gradient_checkpointing: activation_memory is not None and gradient_checkpointing,
            "--activation_memory={activation_memory} decides which blocks are recomputed; "
            "--gradient_checkpointing alone would recompute all",
        ),
    ),
)

LARGE_MODELS = Rules(
    mistakes=(
        Rule(
            "scaled float8 without mixed precision",
            lambda fp8_scaled, mixed_precision: fp8_scaled and mixed_precision == "no",
            "--fp8_scaled is for storing: add --mixed_precision=bf16 (fp16 on older GPUs)",
        ),
        Rule(
            "calculating with float8 that is not there",
            lambda fp8_matmul, fp8_scaled, fp8_base, fp8_base_unet: (
                fp8_matmul and not (fp8_scaled or fp8_base or fp8_base_unet)
            ),
            "--fp8_matmul needs weights in float8: add --fp8_scaled (or --fp8_base)",
        ),
        Rule(
            "LyCORIS on scaled float8",
            lambda network_module, network_args, fp8_scaled: (
                fp8_scaled and calculates_with_weights(network_module, network_args)
            ),
            "--network_module={network_module} " + NO_FLOAT8,
        ),
        Rule(
            "LyCORIS on weights in main memory",
            lambda network_module, network_args, cpu_modulation: (
                cpu_modulation and calculates_with_weights(network_module, network_args)
            ),
            "--network_module={network_module} calculates with the weights, which --cpu_modulation keeps from the "
            "device: add bypass_mode=True to --network_args, or leave --cpu_modulation out",
        ),
        Rule(
            "merging into scaled float8",
            lambda base_weights, fp8_scaled: bool(base_weights and fp8_scaled),
            "--base_weights cannot be added to weights in float8: leave --fp8_scaled out, "
            "or give a model that they are merged into already (FLUX.1: networks/flux_merge_lora.py)",
        ),
    ),
    doubts=(
        Rule(
            "a gradient through main memory",
            lambda cpu_modulation, network_train_unet_only: cpu_modulation and not network_train_unet_only,
            "--cpu_modulation while a text encoder is trained lets the device wait for the processor in each block of "
            "the backward pass: add --network_train_unet_only, or leave it out",
        ),
    ),
    consequences=(
        Consequence(
            "scales before a plain cast",
            lambda fp8_scaled, fp8_base: fp8_scaled and fp8_base,
            "fp8_base",
            False,
            "--fp8_base is ignored: --fp8_scaled rounds the transformer, and text encoders stay in 16 bits",
        ),
        Consequence(
            "scales before a plain cast of the denoiser",
            lambda fp8_scaled, fp8_base_unet: fp8_scaled and fp8_base_unet,
            "fp8_base_unet",
            False,
            "--fp8_base_unet is ignored: --fp8_scaled says how the transformer is rounded",
        ),
    ),
)
"""For the families that take `LargeModelFlags`."""
