"""Do our models answer what was recorded? Each case is a folder with `case.json` and `expected.safetensors`.

An adapter is a module `tests/parity/adapters/<name>.py` with `run(case, recipe) -> dict[str, Tensor]`: it builds the
weights and the inputs of `case` with `recipe`, runs our code, and returns every output of the case, unsliced.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity import recipe

HERE = Path(__file__).resolve().parent
ADAPTERS = {
    "unet": ["sd15_unet", "sd21_unet"],
    "vae": ["sd_vae"],
    "text_encoder": ["sd15_text_encoder", "sd21_text_encoder"],
    "sdxl": ["sdxl_unet", "sdxl_text_encoders", "sdxl_size_embeddings"],
    "lora": ["lora_sd", "lora_sd21"],
    "lora_sdxl": ["lora_sdxl", "loha_lokr_sdxl"],
    "lora_flux": ["lora_flux"],
    "lllite": ["lllite_sdxl"],
    "lora_variants": ["lora_variants_sd15"],
    "flux_lora_convert": ["flux_lora_convert"],
    "flux_lora_merge": ["flux_lora_merge"],
    "flux_lora_extract": ["flux_lora_extract"],
    "noise_and_loss": ["sd_noise_and_loss"],
    "samplers": ["genimg_samplers"],
    "flux": ["flux_dev", "flux_schnell", "flux_diffusers_layout", "flux_controlnet", "chroma"],
    "flux_ae": ["flux_ae"],
    "flux_text": ["flux_text_encoders"],
    "flow_schedule": ["flux_schedule"],
    "flux_denoise": ["flux_denoise"],
    "fp8": ["fp8_scaled_quant"],
}

BOUNDS = ("atol", "rtol", "relative_norm")
"""How far an output may be from the recorded one: each value, or all of them together."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_folder" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--parity-cases")
    folder = HERE / "cases" if given is None else (metafunc.config.invocation_params.dir / given).resolve()
    found = [path.parent for pattern in ("case.json", "*/case.json") for path in sorted(folder.glob(pattern))]
    if not found:
        raise pytest.UsageError(f"--parity-cases {folder}: no <case>/case.json in this folder")
    metafunc.parametrize("case_folder", found, ids=[path.name for path in found])


def test_outputs_equal_the_recorded_ones(case_folder: Path, request: pytest.FixtureRequest) -> None:
    case = json.loads((case_folder / "case.json").read_text(encoding="utf-8"))
    expected = load_file(case_folder / "expected.safetensors")
    adapter = adapter_of(case["case"])
    if adapter is None:
        message = f"no adapter yet: {case['case']}"
        if request.config.getoption("--parity-cases") is None:
            pytest.fail(message)
        pytest.skip(message)
    with torch.no_grad():
        outputs = importlib.import_module(f"tests.parity.adapters.{adapter}").run(case, recipe)
    slices = case.get("slices", {})
    sliced = {name: value[slice_of(slices[name])] if name in slices else value for name, value in outputs.items()}
    tolerance = {bound: case["tolerance"][bound] for bound in BOUNDS if bound in case["tolerance"]}
    faults = compare(sliced, expected, **tolerance)
    assert not faults, f"{case['case']}, worst first:\n" + "\n".join(faults)


def adapter_of(case_name: str) -> str | None:
    return next((adapter for adapter, names in ADAPTERS.items() if case_name in names), None)


def slice_of(text: str) -> tuple[slice, ...]:
    """`"[:, ::3]"` -> the index it spells; only slices, no code."""
    assert re.fullmatch(r"\[[\d:,\s-]*\]", text), text
    return tuple(
        slice(*(int(bound) if bound.strip() else None for bound in part.split(":"))) for part in text[1:-1].split(",")
    )


def compare(outputs: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> list[str]:
    """One line per output that is wrong, the worst first; an output that was not recorded is wrong as well."""
    faults: list[tuple[float, str]] = []
    for name in sorted(outputs.keys() | expected.keys()):
        if name not in outputs or name not in expected:
            where = "was recorded but not computed" if name in expected else "was computed but not recorded"
            faults.append((float("inf"), f"{name}: {where}"))
        elif outputs[name].shape != expected[name].shape:
            shapes = f"{list(outputs[name].shape)} instead of {list(expected[name].shape)}"
            faults.append((float("inf"), f"{name}: shape {shapes}"))
        else:
            faults += difference(name, outputs[name].double(), expected[name].double(), **tolerance)
    return [line for _, line in sorted(faults, key=lambda fault: -fault[0])]


def difference(
    name: str, ours: Tensor, theirs: Tensor, atol: float = 0.0, rtol: float = 0.0, relative_norm: float | None = None
) -> list[tuple[float, str]]:
    """Nothing, or how many times the largest error exceeds what is allowed."""
    if relative_norm is not None:
        share = float((ours - theirs).norm() / theirs.norm())
        excess_of_norm = share / relative_norm
        line = f"{name}: differs by {share:.3g} of the norm, {excess_of_norm:.3g} times the tolerance"
        return [] if excess_of_norm <= 1 else [(excess_of_norm, line)]
    error = torch.where(ours == theirs, 0.0, (ours - theirs).abs())
    allowed = (atol + rtol * theirs.abs()).clamp_min(1e-300)  # a tolerance of 0 asks for equality
    excess = (error / allowed).nan_to_num(float("inf"), float("inf"))
    if not excess.numel() or excess.max() <= 1:
        return []
    place = [int(index) for index in torch.unravel_index(excess.argmax(), excess.shape)]
    values = f"{ours.flatten()[excess.argmax()]:.7g} instead of {theirs.flatten()[excess.argmax()]:.7g}"
    wrong = f"{int((excess > 1).sum())} of {excess.numel()} values wrong"
    line = f"{name}: {wrong}, the worst at {place} {excess.max():.3g} times the tolerance: {values}"
    return [(float(excess.max()), line)]
