"""Runs the cases of SDXL's U-Net and text encoders: a checkpoint is written, and loaded as a user's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.data.buckets import crop_condition
from library.files.weights import save_safetensors
from library.models.sdxl.architecture import Sdxl, size_embedding
from library.models.sdxl.checkpoint import load_text_encoders, load_unet
from library.models.text.clip import joined_rows
from tests.parity.adapters.text_encoder import WordIds, rows_of, texts_of

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    return {
        "sdxl_unet": unet_outputs,
        "sdxl_text_encoders": text_outputs,
        "sdxl_size_embeddings": size_outputs,
    }[case["case"]](case, recipe)


def unet_outputs(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        unet = load_unet(written(case, recipe, folder), torch.float32, CPU)
    states: list[Tensor] = []
    hook = unet.middle_block.register_forward_hook(lambda module, args, output: states.append(output))
    latents, context, pooled = (
        recipe.tensor(name, case["inputs"][name]["shape"], case["seed"]) for name in ("latents", "context", "pooled")
    )
    t = torch.tensor(case["inputs"]["timesteps"]["value"])
    out = unet(latents, t, context, torch.cat([pooled, size_embedding(sizes_of(case))], dim=1))
    hook.remove()
    return {"out": out, "mid": states[0]}


def text_outputs(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    configs = [case["config"]["text_encoder_1"], case["config"]["text_encoder_2"]]
    tokenizers = [WordIds(c["bos_token_id"], c["eos_token_id"], c["pad_token_id"]) for c in configs]
    with tempfile.TemporaryDirectory() as folder:
        path = written(case, recipe, folder)
        encoders = load_text_encoders(path, configs[1]["eos_token_id"], torch.float32, CPU)
    prompts, weighted = texts_of(case, recipe)
    outputs = {}
    for length in (75, 225):
        for number, tokenizer in enumerate(tokenizers, start=1):
            outputs[f"tokens{number}_{length}"] = rows_of(tokenizer, prompts, length).ids
        states = hidden_states(encoders, outputs[f"tokens1_{length}"], outputs[f"tokens2_{length}"])
        for number in (1, 2):
            hidden = states[f"hidden_state{number}"]
            outputs[f"hidden{number}_{length}"] = joined_rows(hidden, None)
            weights = rows_of(tokenizers[number - 1], weighted, length, weighted=True).weights
            outputs[f"hidden{number}_weighted_{length}"] = joined_rows(hidden, weights)
        if length == 75:
            outputs["pool2_75_original_convention"] = states["pool2"]
        outputs[f"pool2_{length}"] = with_transposed_projection(encoders, outputs[f"tokens2_{length}"])
    return outputs


def size_outputs(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    """From a process in which MKL calculates alike on every make of CPU: sizes multiply the last bit of exp by 4096."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "case.json", Path(folder) / "answer.safetensors"
        given.write_text(json.dumps(case), encoding="utf-8")
        command = [sys.executable, "-m", "tests.parity.adapters.sdxl", str(given), str(answer)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"MKL_CBWR": "COMPATIBLE"}, check=True)
        return load_file(answer)


def sizes_here(case: dict[str, Any]) -> dict[str, Tensor]:
    """What `size_outputs` answers, in this process."""
    inputs = case["inputs"]
    scalars = torch.tensor(inputs["scalars"]["value"])
    crops = [
        crop_condition(tuple(image), tuple(bucket))
        for bucket, image in zip(inputs["bucket_wh"]["value"], inputs["image_wh"]["value"], strict=True)
    ]
    return {
        "embedding": size_embedding(sizes_of(case)),
        "scalar_embedding": size_embedding(scalars[:, None]),
        "crop_ltrb": torch.tensor(crops),
    }


def hidden_states(encoders: Any, first_ids: Tensor, second_ids: Tensor) -> dict[str, Tensor]:
    """Rows of states and the pooled text, as the architecture asks the encoders for them."""
    return Sdxl._states(None, encoders, {"input_ids": first_ids, "input_ids2": second_ids})  # type: ignore[arg-type]


def with_transposed_projection(encoders: Any, ids: Tensor) -> Tensor:
    """The pooled text by the convention of the program that was recorded, which is not that of the model."""
    second = encoders[1]
    published = second.text_projection.data
    second.text_projection.data = published.T.contiguous()
    pooled = Sdxl._states(None, [None, second], {"input_ids2": ids})["pool2"]  # type: ignore[arg-type]
    second.text_projection.data = published
    return pooled


def sizes_of(case: dict[str, Any]) -> Tensor:
    """[B, 6]"""
    names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    return torch.cat([torch.tensor(case["inputs"][name]["value"]) for name in names], dim=1)


def written(case: dict[str, Any], recipe: ModuleType, folder: str) -> Path:
    """The checkpoint of `case` as a file."""
    path = Path(folder) / "model.safetensors"
    save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), path)
    return path


if __name__ == "__main__":
    save_file(sizes_here(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), sys.argv[2])
