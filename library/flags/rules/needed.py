"""What no run can do without."""

from library.flags.rules.rule import Rule, Rules

NEEDED = Rules(
    mistakes=(
        Rule(
            "no base model",
            lambda pretrained_model_name_or_path: not pretrained_model_name_or_path,
            "--pretrained_model_name_or_path is missing: name the model to train, a file, a folder or a hub id",
        ),
        Rule(
            "no network module",
            lambda network_module: not network_module,
            "--network_module is missing: --network_module=networks.lora trains a LoRA",
        ),
        Rule(
            "no output folder",
            lambda output_dir: not output_dir,
            "--output_dir is missing: name a folder for the result",
        ),
        Rule(
            "no dataset",
            lambda dataset_config, train_data_dir, in_json, dataset_class: (
                not any((dataset_config, train_data_dir, in_json, dataset_class))
            ),
            "no images: give --dataset_config (a TOML file) "
            "or --train_data_dir (a folder of `<repeats>_<words>` folders)",
        ),
    ),
)
