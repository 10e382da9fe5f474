"""Which settings, and which answers to the launcher, do not go with weights that are divided among processes (FSDP)."""

from collections.abc import Sequence

from library.flags.fsdp_launcher import FREE, KEEP, STRATEGIES, asks_for, divides, sets, strategies
from library.flags.rules.rule import Consequence, Rule, Rules

WHICH_PARTS = {
    "FSDP_AUTO_WRAP_POLICY": "",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_IGNORED_MODULES": "",
}
FILES = {"FSDP_STATE_DICT_TYPE": ""}
BACKWARD = {"FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE"}
"""Variables and what they are when nobody has set them, or what is done anyway."""


def may_skip_adapters(network_args: Sequence[str] | None) -> bool:
    """Whether some processes may have a gradient for a block in which others have none."""
    return any(pair.startswith("module_dropout") for pair in network_args or ())


SHARDING = Rules(
    mistakes=(
        # Rules about the launcher alone read a flag that only trainings have: caches are filled without a denoiser.
        Rule(
            "FSDP that divides nothing",
            lambda max_train_steps: "NO_SHARD" in strategies(),
            "accelerate was launched with FSDP and NO_SHARD, which divides nothing: launch with --multi_gpu instead",
        ),
        Rule(
            "FSDP within machines",
            lambda max_train_steps: any(name.startswith("HYBRID_SHARD") for name in strategies()),
            "accelerate was launched with FSDP and HYBRID_SHARD, which divides weights within a machine alone; "
            "here they are divided among all processes: use FULL_SHARD",
        ),
        Rule(
            "an unknown way of dividing",
            lambda max_train_steps: not strategies() <= set(STRATEGIES),
            "accelerate was launched with an fsdp_sharding_strategy or fsdp_reshard_after_forward that is unknown: "
            f"use {FREE} (or true), or {KEEP} (or false)",
        ),
        Rule(
            "several ways of dividing",
            lambda max_train_steps: asks_for("ACCELERATE_USE_PARALLELISM_CONFIG"),
            "accelerate was launched with a parallelism_config; here FSDP divides weights among all processes, and "
            "nothing else is divided: leave it out",
        ),
        Rule(
            "divided weights and swapped blocks",
            lambda blocks_to_swap: divides() and bool(blocks_to_swap),
            "--blocks_to_swap={blocks_to_swap} and FSDP both say where the weights of blocks lie: leave it out; "
            "fsdp_offload_params: true lets the parts wait in main memory",
        ),
        Rule(
            "divided weights and layers that stay away",
            lambda cpu_modulation: divides() and cpu_modulation,
            "--cpu_modulation and FSDP both say where weights lie: leave it out; fsdp_offload_params: true lets the "
            "parts wait in main memory",
        ),
        Rule(
            "divided weights and DeepSpeed",
            lambda deepspeed: divides() and deepspeed,
            "--deepspeed talks to the other processes during the backward pass, and so does FSDP, which is not tried "
            "out together: launch with --multi_gpu, or leave --deepspeed out",
        ),
        Rule(
            "divided weights and adapters that sit out",
            lambda network_args: divides() and may_skip_adapters(network_args),
            "--network_args: with module_dropout some processes have a gradient for a block and others none, and FSDP "
            "would wait for ever: use rank_dropout or --network_dropout, or launch with --multi_gpu",
        ),
    ),
    doubts=(
        Rule(
            "groups of the launcher's own",
            lambda max_train_steps: sets(WHICH_PARTS),
            "the launcher's fsdp_auto_wrap_policy and what belongs to it have no effect: all frozen weights of the "
            "denoiser are divided, each of its blocks in one piece",
        ),
        Rule(
            "files of divided weights",
            lambda max_train_steps: sets(FILES),
            "the launcher's fsdp_state_dict_type has no effect: files hold what is trained, and that is whole",
        ),
        Rule(
            "fetching later",
            lambda max_train_steps: sets(BACKWARD),
            "the launcher's fsdp_backward_prefetch has no effect: weights are fetched one block ahead (BACKWARD_PRE)",
        ),
    ),
    consequences=(
        Consequence(
            "the launcher's recomputation",
            lambda gradient_checkpointing: asks_for("FSDP_ACTIVATION_CHECKPOINTING") and not gradient_checkpointing,
            "gradient_checkpointing",
            True,
            "the launcher's fsdp_activation_checkpointing switches --gradient_checkpointing on",
        ),
        Consequence(
            "the launcher's offloading",
            lambda cpu_offload_checkpointing: (
                asks_for("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD") and not cpu_offload_checkpointing
            ),
            "cpu_offload_checkpointing",
            True,
            "the launcher's fsdp_activation_checkpointing_offload switches --cpu_offload_checkpointing on",
        ),
    ),
)
