"""What should main memory hold one after the other? Writes large parts of FLUX.1 and prints commands; see bench.py.

The parts have a tenth of their published sizes or less. bench.py measures the commands: a process that has made the
parts is large itself, and Linux counts that as the memory of those it starts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo_checkpoint import Shapes, drawn
from demo_flux_folder import FluxDemo, write_flux_demo
from demo_flux_weights import FluxSizes, t5_shapes, transformer_shapes
from library.files.weights import open_weights, save_safetensors

TRANSFORMER = {"width": 1024, "heads": 8, "double_blocks": 6, "single_blocks": 12}
T5 = {"t5": 2048, "t5_heads": 32, "t5_layers": 10}
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")


def main(folder: Path) -> int:
    """Write the parts into `folder`; print their gigabytes and the commands that use them."""
    demo = write_flux_demo(folder)
    enlarge(demo)
    train = ["flux_train_network.py", *train_words(demo)]
    commands = {
        "nothing": [*train, "--dry_run"],
        "cached": [*train, *CACHED],
        "uncached": train,
        "picture": ["flux_minimal_inference.py", *picture_words(demo)],
    }
    sizes = {"transformer": demo.transformer().stat().st_size / 1e9, "t5xxl": demo.t5xxl.stat().st_size / 1e9}
    print(json.dumps({**sizes, "commands": commands}))
    return 0


def enlarge(demo: FluxDemo) -> None:
    """Put a large transformer and a large T5 in the places of the small ones."""
    with open_weights(demo.t5xxl) as file, open_weights(demo.clip_l) as clip:
        vocabulary, pooled = file.shape("shared.weight")[0], clip.shape("text_model.final_layer_norm.weight")[0]
    sizes = FluxSizes(**TRANSFORMER, **T5, clip=pooled, t5_vocabulary=vocabulary)
    for shapes, path in ((transformer_shapes(sizes, "dev"), demo.transformer()), (t5_shapes(sizes), demo.t5xxl)):
        write_large(shapes, path)


def write_large(shapes: Shapes, path: Path) -> None:
    """A model of these shapes in bfloat16."""
    save_safetensors({key: drawn(key, shape, 0).bfloat16() for key, shape in shapes.items()}, path, {})


def model_words(demo: FluxDemo) -> list[str]:
    """What both scripts are told."""
    parts = ["--clip_l", str(demo.clip_l), "--t5xxl", str(demo.t5xxl), "--ae", str(demo.ae), "--seed", "1"]
    parts += ["--tokenizer_cache_dir", str(demo.tokenizers), "--t5xxl_max_token_length", "32"]
    return [*parts, "--output_dir", str(demo.root / "output")]


def train_words(demo: FluxDemo) -> list[str]:
    """One step on the transformer alone."""
    words = ["--pretrained_model_name_or_path", str(demo.transformer()), "--dataset_config", str(demo.dataset)]
    words += ["--network_module", "networks.lora_flux", "--network_train_unet_only", "--max_train_steps", "1"]
    words += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--max_data_loader_n_workers", "0"]
    return [*model_words(demo), *words]


def picture_words(demo: FluxDemo) -> list[str]:
    """One step of a small picture."""
    size = ["--width", "64", "--height", "64", "--steps", "1"]
    return ["--ckpt_path", str(demo.transformer()), *model_words(demo), *size]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])))
