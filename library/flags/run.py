"""How long a run is, in which numbers it calculates and where its weights lie."""

from dataclasses import dataclass

from library.flags.declare import flag

AUTO = "auto"
ONE_BUFFER = "gradients of all weights are one buffer already"


def count_or_auto(text: str | int | None) -> int | str | None:
    """A number of blocks, or auto."""
    if text is None or text == AUTO:
        return text
    try:
        count = int(text)
    except ValueError:
        raise ValueError(f"must be a number of blocks or {AUTO}, got {text!r}") from None
    if count < 0:
        raise ValueError(f"must be at least 0, got {count}")
    return count


def gigabytes_or_auto(text: str | None) -> str | None:
    """A number of gigabytes as it was written, or auto."""
    if text is None or text == AUTO:
        return text
    try:
        size = float(text)
    except ValueError:
        raise ValueError(f"must be a number of gigabytes or {AUTO}, got {text!r}") from None
    if not 0 <= size < float("inf"):
        raise ValueError(f"must be at least 0, got {text}")
    return text


@dataclass(frozen=True)
class StepFlags:
    """Steps"""

    max_train_steps: int = flag(1600, "optimizer steps of the run", at_least=1)
    max_train_epochs: int | None = flag(None, "epochs of the run; wins over max_train_steps", at_least=1)
    seed: int | None = flag(None, "seed of every random draw; a random one unless given", at_least=0)
    gradient_accumulation_steps: int = flag(1, "batches whose gradients are summed for one step", at_least=1)
    skip_until_initial_step: bool = flag(
        False, no_effect="a run always goes on with the batch that comes next, and reads none of those before it"
    )
    initial_epoch: int | None = flag(None, "begin with this epoch, 1 for the first", at_least=1)
    initial_step: int | None = flag(None, "begin after this many steps; wins over initial_epoch", at_least=0)


@dataclass(frozen=True)
class PrecisionFlags:
    """Precision"""

    mixed_precision: str = flag("no", "number format of the calculation", choices=("no", "fp16", "bf16"))
    full_fp16: bool = flag(False, "trained weights and gradients in fp16 too; needs mixed_precision fp16")
    full_bf16: bool = flag(False, "trained weights and gradients in bf16 too; needs mixed_precision bf16")
    fp8_base: bool = flag(False, "frozen weights of the denoiser and the text encoders in float8, by a plain cast")
    fp8_base_unet: bool = flag(False, "the same for the denoiser alone: text encoders stay in 16 bits")
    no_half_vae: bool = flag(False, "run the VAE in float32, against black or broken pictures")


@dataclass(frozen=True)
class AttentionFlags:
    """Attention"""

    mem_eff_attn: bool = flag(False, "attention in slices, in plain torch: slow, little memory")
    xformers: bool = flag(False, "attention of the package xformers")
    sdpa: bool = flag(False, "attention of torch (scaled_dot_product_attention): the fastest in most cases")


@dataclass(frozen=True)
class MemoryFlags:
    """Memory"""

    torch_compile: bool = flag(False, "compile the blocks of the denoiser, one program for all of a kind")
    dynamo_backend: str = flag(
        "inductor",
        "compiler of torch_compile",
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
    )
    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: slower, less memory")
    activation_memory: str | None = flag(
        None,
        "GB for activations, or auto for what is free: each block keeps all of them, only products, or none, so that "
        "as little as possible is computed again",
        parse=gigabytes_or_auto,
    )
    lowram: bool = flag(False, no_effect="models are always loaded straight to the training device")
    highvram: bool = flag(False, no_effect="memory is never emptied between steps, so there is nothing to switch off")
    cpu_offload_checkpointing: bool = flag(
        False, "with gradient_checkpointing: what a block needs to be computed again waits in main memory"
    )


@dataclass(frozen=True)
class LargeModelFlags:
    """Memory of large transformers"""

    blocks_to_swap: int | str | None = flag(
        None,
        "transformer blocks whose frozen weights lie in main memory and come to the device when they are needed; auto "
        "finds out how many after the first step",
        type=str,
        parse=count_or_auto,
    )
    cpu_modulation: bool = flag(
        False,
        "layers that are given one vector for each picture, such as those that modulate the blocks, stay in main "
        "memory and are calculated by the processor",
    )
    fp8_scaled: bool = flag(
        False, "frozen weights of the transformer blocks in float8 with scales: closer than fp8_base"
    )
    fp8_matmul: bool = flag(
        False, "calculate with float8 too: faster on RTX 40, H100 and later GPUs, a little less exact"
    )


@dataclass(frozen=True)
class DistributedFlags:
    """Several processes"""

    ddp_timeout: int | None = flag(None, "minutes to wait for the other processes", at_least=1)
    ddp_gradient_as_bucket_view: bool = flag(False, no_effect=ONE_BUFFER)
    ddp_static_graph: bool = flag(False, no_effect=ONE_BUFFER)
    deepspeed: bool = flag(False, "let DeepSpeed update the weights; needs the package deepspeed")
    zero_stage: int = flag(
        2, "what DeepSpeed divides among processes: 0 nothing, 1 optimizer state, 2 gradients too", choices=(0, 1, 2, 3)
    )
    offload_optimizer_device: str | None = flag(
        None, "where DeepSpeed keeps optimizer state and updates weights", choices=(None, "cpu", "nvme")
    )
    offload_optimizer_nvme_path: str | None = flag(None, "folder for optimizer state on a disk, for ZeRO 3")
    offload_param_device: str | None = flag(None, "where weights wait, for ZeRO 3", choices=(None, "cpu", "nvme"))
    offload_param_nvme_path: str | None = flag(None, "folder for weights on a disk, for ZeRO 3")
    zero3_init_flag: bool = flag(False, "build models in parts, for ZeRO 3")
    zero3_save_16bit_model: bool = flag(False, "gather weights for saving, for ZeRO 3")
    fp16_master_weights_and_gradients: bool = flag(False, "master weights in fp16, for weights trained in fp16")


@dataclass(frozen=True)
class StrictFlags:
    """Checks"""

    max_nonfinite_steps: int = flag(
        3, "end the run after this many losses or gradients in a row that are not finite", at_least=1
    )
    strict: bool = flag(False, "a flag that has no effect with the chosen model is an error, not a warning")
    dry_run: bool = flag(
        False, "check everything, say what the run would do and need, and stop before weights are read"
    )
