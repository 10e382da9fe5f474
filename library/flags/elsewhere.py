"""Flags that only some training scripts have, and which scripts these are."""

from collections.abc import Mapping

_NETWORKS = ("train_network.py", "sdxl_train_network.py", "flux_train_network.py")
_LLLITE = "sdxl_train_control_net_lllite.py"
_BY_SCRIPTS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("flux_train_network.py",): (
        *("ae", "clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask", "controlnet_model_name_or_path"),
        *("model_type", "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"),
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale"),
        *("split_mode", "blocks_to_swap", "fp8_scaled", "fp8_matmul", "cpu_modulation"),
    ),
    ("sdxl_train_network.py",): ("text_encoder_lr1", "text_encoder_lr2"),
    (*_NETWORKS[1:], _LLLITE): (
        *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_cache_variants"),
        *("text_encoder_batch_size", "disable_mmap_load_safetensors"),
    ),
    _NETWORKS: (
        *("network_module", "network_alpha", "network_args", "dim_from_weights", "base_weights"),
        *("base_weights_multiplier", "scale_weight_norms", "network_train_unet_only"),
        "network_train_text_encoder_only",
    ),
    (*_NETWORKS, _LLLITE): ("network_dim", "network_dropout", "network_weights"),
    (_LLLITE,): ("cond_emb_dim",),
    ("train_db.py",): ("learning_rate_te", "stop_text_encoder_training", "no_token_padding", "use_safetensors"),
}

SCRIPTS_WITH: Mapping[str, tuple[str, ...]] = {
    name: scripts for scripts, names in _BY_SCRIPTS.items() for name in names
}
"""Flag -> the scripts that have it; flags of every training script are not there."""


def scripts_with(name: str) -> str:
    """The scripts that have `--name`, as words; "" where every training script has it, or none."""
    *others, last = SCRIPTS_WITH.get(name, ("",))
    return f"{', '.join(others)} and {last}" if others else last
