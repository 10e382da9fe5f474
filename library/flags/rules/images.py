"""Which settings of images, captions and caches do not go together."""

from library.flags.rules.rule import Consequence, Rule, Rules

IMAGES = Rules(
    mistakes=(
        Rule(
            "two sources of images",
            lambda dataset_config, train_data_dir, in_json, dataset_class: bool(
                dataset_class and (dataset_config or train_data_dir or in_json)
            ),
            "--dataset_class={dataset_class} makes the training set by itself: "
            "leave --dataset_config, --train_data_dir and --in_json out",
        ),
        Rule(
            "conditioning images without images",
            lambda conditioning_data_dir, train_data_dir, dataset_config: bool(
                conditioning_data_dir and not train_data_dir and not dataset_config
            ),
            "--conditioning_data_dir needs --train_data_dir, the folder with the images they belong to",
        ),
        Rule(
            "folder without resolution",
            lambda dataset_config, train_data_dir, resolution: bool(
                train_data_dir and not dataset_config and not resolution
            ),
            "--train_data_dir needs --resolution, such as --resolution=512",
        ),
        Rule(
            "cached latents with random crops",
            lambda cache_latents, random_crop: cache_latents and random_crop,
            "--random_crop needs the pixels at every step: leave it or --cache_latents out",
        ),
        Rule(
            "cached latents with changing colours",
            lambda cache_latents, color_aug: cache_latents and color_aug,
            "--color_aug needs the pixels at every step: leave it or --cache_latents out",
        ),
        Rule(
            "cached latents with crops around faces",
            lambda cache_latents, face_crop_aug_range, enable_bucket: bool(
                cache_latents and face_crop_aug_range and not enable_bucket
            ),
            "--face_crop_aug_range needs the pixels at every step: leave it or --cache_latents out",
        ),
        Rule(
            "persistent workers without workers",
            lambda persistent_data_loader_workers, max_data_loader_n_workers: (
                persistent_data_loader_workers and max_data_loader_n_workers == 0
            ),
            "--persistent_data_loader_workers needs --max_data_loader_n_workers=1 or more",
        ),
    ),
    doubts=(
        Rule(
            "crops around faces with buckets",
            lambda face_crop_aug_range, enable_bucket: bool(face_crop_aug_range and enable_bucket),
            "--face_crop_aug_range has no effect with --enable_bucket",
        ),
    ),
    consequences=(
        Consequence(
            "latents on disk are cached latents",
            lambda cache_latents_to_disk, cache_latents: cache_latents_to_disk and not cache_latents,
            "cache_latents",
            True,
            "--cache_latents_to_disk switches --cache_latents on",
        ),
        Consequence(
            "text on disk is cached text",
            lambda cache_text_encoder_outputs_to_disk, cache_text_encoder_outputs: (
                cache_text_encoder_outputs_to_disk and not cache_text_encoder_outputs
            ),
            "cache_text_encoder_outputs",
            True,
            "--cache_text_encoder_outputs_to_disk switches --cache_text_encoder_outputs on",
        ),
        Consequence(
            "dataset_config before train_data_dir",
            lambda dataset_config, train_data_dir: bool(dataset_config and train_data_dir),
            "train_data_dir",
            None,
            "--train_data_dir is ignored: --dataset_config says where the images are",
        ),
        Consequence(
            "dataset_config before reg_data_dir",
            lambda dataset_config, reg_data_dir: bool(dataset_config and reg_data_dir),
            "reg_data_dir",
            None,
            "--reg_data_dir is ignored: --dataset_config says where the images are",
        ),
        Consequence(
            "dataset_config before in_json",
            lambda dataset_config, in_json: bool(dataset_config and in_json),
            "in_json",
            None,
            "--in_json is ignored: --dataset_config says where the images are",
        ),
        Consequence(
            "dataset_config before conditioning_data_dir",
            lambda dataset_config, conditioning_data_dir: bool(dataset_config and conditioning_data_dir),
            "conditioning_data_dir",
            None,
            "--conditioning_data_dir is ignored: --dataset_config says where the images are",
        ),
    ),
)
