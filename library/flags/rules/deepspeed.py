"""Which settings DeepSpeed cannot be given."""

import importlib.util
from collections.abc import Sequence

from library.flags.deepspeed_launcher import ACCUMULATION, CLIPPING, differs, has_config_file
from library.flags.rules.rule import Rule, Rules, under

WHOLE_TENSORS = ("dadapt", "prodigy", "adafactor", "schedulefree", "lamb", "lars", "muon", "came", "lbfgs", "adamini")
"""In the names of optimizers that need whole tensors or all of them at once, or that change weights for evaluation."""

DIVIDED_ARGUMENTS = ("ggpo_", "module_dropout")
"""Arguments of networks that read gradients, or after which some ranks have a gradient for a layer and others none."""


def needs_whole_tensors(optimizer_type: str) -> bool:
    """Whether an optimizer would go wrong on a part of each tensor."""
    name = optimizer_type.rpartition(".")[2].lower().replace("_", "")
    return any(part in name for part in WHOLE_TENSORS)


def need_whole_gradients(network_args: Sequence[str] | None) -> bool:
    """Whether an argument of the network is one of `DIVIDED_ARGUMENTS`."""
    return any(pair.startswith(DIVIDED_ARGUMENTS) for pair in network_args or ())


def on(deepspeed: bool) -> bool:
    """Whether DeepSpeed updates the weights."""
    return deepspeed


def off(deepspeed: bool) -> bool:
    """Whether it does not."""
    return not deepspeed


def divided(deepspeed: bool, zero_stage: int) -> bool:
    """Whether each process has a part of every tensor."""
    return deepspeed and zero_stage > 0


ONLY_ZERO_3 = "belongs to ZeRO 3, which is not possible here (see --zero_stage=3)"

DEEPSPEED = Rules(
    mistakes=under(
        on,
        Rule(
            "a file of DeepSpeed's own",
            lambda: has_config_file(),
            "accelerate was launched with a deepspeed_config_file, which is not read: launch without it and give "
            "--zero_stage and --offload_optimizer_device to the script",
        ),
        Rule(
            "DeepSpeed is not installed",
            lambda: importlib.util.find_spec("deepspeed") is None,
            "--deepspeed needs the package deepspeed: pip install deepspeed",
        ),
        Rule(
            "divided weights",
            lambda zero_stage: zero_stage == 3,
            "--zero_stage=3 divides the trained weights themselves and gathers those of a module when its forward "
            "runs inside DeepSpeed's engine; here they work inside layers of a frozen model that is outside of it, and "
            "files, norms and averages read them whole: use --zero_stage=2, or `accelerate launch --use_fsdp` without "
            "--deepspeed, which divides the frozen model",
        ),
        Rule(
            "optimizer state on a disk",
            lambda offload_optimizer_device: offload_optimizer_device == "nvme",
            f"--offload_optimizer_device=nvme {ONLY_ZERO_3}: use --offload_optimizer_device=cpu",
        ),
        Rule(
            "weights elsewhere",
            lambda offload_param_device: offload_param_device is not None,
            f"--offload_param_device={{offload_param_device}} {ONLY_ZERO_3}: frozen weights have --blocks_to_swap",
        ),
        Rule(
            "offloading what is not divided",
            lambda offload_optimizer_device, zero_stage: offload_optimizer_device is not None and zero_stage == 0,
            "--offload_optimizer_device={offload_optimizer_device} needs --zero_stage=1 or 2",
        ),
        Rule(
            "master weights in fp16",
            lambda fp16_master_weights_and_gradients: fp16_master_weights_and_gradients,
            "--fp16_master_weights_and_gradients is for weights that DeepSpeed's own Adam trains in fp16; here they "
            "are trained in float32: leave it out",
        ),
        Rule(
            "DeepSpeed with scaled losses",
            lambda mixed_precision: mixed_precision == "fp16",
            "--deepspeed scales losses only for weights in fp16, in which small steps are lost: "
            "use --mixed_precision=bf16",
        ),
        Rule(
            "DeepSpeed with weights in 16 bits",
            lambda full_bf16: full_bf16,
            "--deepspeed trains float32 weights, whose optimizer state it divides: leave --full_bf16 out",
        ),
        Rule(
            "DeepSpeed and updates during backward",
            lambda fused_backward_pass: fused_backward_pass,
            "--deepspeed and --fused_backward_pass are two ways of updating weights: leave one out",
        ),
        Rule(
            "DeepSpeed and an early end of the text encoder",
            lambda stop_text_encoder_training: (stop_text_encoder_training or 0) > 0,
            "--stop_text_encoder_training={stop_text_encoder_training} would take weights out of buffers that "
            "DeepSpeed divides for the whole run: leave it or --deepspeed out",
        ),
        Rule(
            "8-bit optimizers on the CPU",
            lambda offload_optimizer_device, optimizer_type: (
                offload_optimizer_device is not None and "8bit" in optimizer_type.lower()
            ),
            "--optimizer_type={optimizer_type} works on the GPU, not where --offload_optimizer_device puts it: "
            "use AdamW, or leave the offloading out",
        ),
    )
    + under(
        divided,
        Rule(
            "parts of tensors for an optimizer of whole ones",
            lambda optimizer_type: needs_whole_tensors(optimizer_type),
            "--optimizer_type={optimizer_type} goes wrong on the parts that ZeRO {zero_stage} gives to each process: "
            "use --zero_stage=0, or AdamW, Lion or another that treats every number by itself",
        ),
        Rule(
            "an optimizer that DeepSpeed replaces",
            lambda optimizer_type: optimizer_type.rpartition(".")[2].lower() == "adagrad",
            "--optimizer_type={optimizer_type} is made anew by ZeRO {zero_stage}, which then knows neither the "
            "schedule nor the rates of groups: use --zero_stage=0, or another optimizer",
        ),
        Rule(
            "scaling weights that are divided",
            lambda scale_weight_norms: scale_weight_norms is not None,
            "--scale_weight_norms changes weights of which ZeRO {zero_stage} keeps copies in parts, so that the change "
            "is lost: use --zero_stage=0",
        ),
        Rule(
            "arguments that need whole gradients",
            lambda network_args: need_whole_gradients(network_args),
            "--network_args: module_dropout and ggpo_* need a whole gradient for every layer in each process, "
            "which ZeRO {zero_stage} divides: use --zero_stage=0",
        ),
    ),
    doubts=under(
        on,
        Rule(
            "another accumulation for the launcher",
            lambda gradient_accumulation_steps: differs(ACCUMULATION, gradient_accumulation_steps),
            "the gradient_accumulation_steps of the launcher do not count: "
            "--gradient_accumulation_steps={gradient_accumulation_steps} of the script do",
        ),
        Rule(
            "another clipping for the launcher",
            lambda max_grad_norm: differs(CLIPPING, max_grad_norm),
            "the gradient_clipping of the launcher does not count: --max_grad_norm={max_grad_norm} of the script does",
        ),
        Rule(
            "flags of ZeRO 3",
            lambda zero3_init_flag, zero3_save_16bit_model, offload_optimizer_nvme_path: bool(
                zero3_init_flag or zero3_save_16bit_model or offload_optimizer_nvme_path
            ),
            "--zero3_* and --offload_optimizer_nvme_path have no effect: they are for ZeRO 3",
        ),
        Rule(
            "a folder for weights that stay",
            lambda offload_param_nvme_path: bool(offload_param_nvme_path),
            "--offload_param_nvme_path has no effect: it is for ZeRO 3",
        ),
    )
    + under(
        off,
        Rule(
            "DeepSpeed's flags without it",
            lambda zero_stage, offload_optimizer_device, offload_param_device: (
                zero_stage != 2 or offload_optimizer_device is not None or offload_param_device is not None
            ),
            "--zero_stage and --offload_* have no effect without --deepspeed",
        ),
        Rule(
            "DeepSpeed's other flags without it",
            lambda zero3_init_flag, zero3_save_16bit_model, fp16_master_weights_and_gradients: (
                zero3_init_flag or zero3_save_16bit_model or fp16_master_weights_and_gradients
            ),
            "--zero3_* and --fp16_master_weights_and_gradients have no effect without --deepspeed",
        ),
    ),
)
