"""flux_minimal_inference.py on the small models: pictures of one prompt or typed ones, and its mistakes."""

from __future__ import annotations

import io
import logging
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo_flux_folder import FluxDemo
from library.flags.settings import read_settings
from library.models.flux.picture_flags import FLUX_PICTURES, PICTURE_RULES

SCRIPT = Path(__file__).resolve().parents[2] / "flux_minimal_inference.py"
Pictures = list[np.ndarray[Any, Any]]
Run = Callable[..., Pictures]


def words_for(demo: FluxDemo, output: Path, kind: str) -> list[str]:
    words = ["--ckpt_path", str(demo.transformer(kind)), "--t5xxl", str(demo.t5xxl), "--ae", str(demo.ae)]
    words += ["--tokenizer_cache_dir", str(demo.tokenizers), "--output_dir", str(output)]
    words += ["--t5xxl_max_token_length", "16", "--dtype", "fp32"]
    return [*words, "--model_type", "chroma"] if kind == "chroma" else [*words, "--clip_l", str(demo.clip_l)]


@pytest.fixture(scope="module")
def main() -> Callable[[Any], int]:
    script: dict[str, Any] = runpy.run_path(str(SCRIPT), run_name="flux_minimal_inference")
    return script["main"]  # type: ignore[no-any-return]


@pytest.fixture
def run(small_flux: FluxDemo, tmp_path: Path, main: Callable[[Any], int]) -> Run:
    """The pictures of a command line, oldest first, and that the exit code is what it should be."""

    def pictures(*words: str, kind: str = "dev", code: int = 0) -> Pictures:
        before = set(tmp_path.glob("*.png"))
        size = ["--width", "80", "--height", "64", "--steps", "3", "--seed", "1"]
        argv = [*words_for(small_flux, tmp_path, kind), *size, *words]
        assert main(read_settings(FLUX_PICTURES, "test", argv=argv, rules=PICTURE_RULES)) == code
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(set(tmp_path.glob("*.png")) - before)]

    return pictures


def difference(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    return float(np.abs(first - second).mean())


@pytest.mark.parametrize("kind", ["dev", "schnell", "chroma"])
def test_equal_seeds_give_equal_pictures_and_prompts_matter(run: Run, kind: str) -> None:
    (first,), (again,) = run("--prompt", "a red star", kind=kind), run("--prompt", "a red star", kind=kind)
    (other,) = run("--prompt", "an orange circle", kind=kind)
    assert first.shape == (64, 80, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_sides_are_enlarged_to_multiples_of_16_and_at_least_64(run: Run) -> None:
    (picture,) = run("--width", "65", "--height", "33")
    assert picture.shape == (64, 80, 3)


def test_a_negative_prompt_counts_with_a_scale_only(run: Run) -> None:
    (plain,), (guided,) = run(), run("--negative_prompt", "star", "--cfg_scale", "4")
    (unscaled,), (alone,) = run("--negative_prompt", "star"), run("--cfg_scale", "4")
    assert not np.array_equal(plain, guided)
    assert np.array_equal(plain, unscaled) and np.array_equal(plain, alone)


def test_guidance_is_told_to_dev_and_not_to_schnell(run: Run) -> None:
    assert not np.array_equal(run("--guidance", "1")[0], run("--guidance", "9")[0])
    assert np.array_equal(run("--guidance", "1", kind="schnell")[0], run("--guidance", "9", kind="schnell")[0])


def test_parts_in_float8_and_in_half_precision_make_nearly_the_same_picture(run: Run) -> None:
    (exact,) = run()
    (half,) = run("--dtype", "bf16")
    (rounded,) = run("--flux_dtype", "fp8", "--t5xxl_dtype", "fp8", "--clip_l_dtype", "fp8")
    assert 0 < difference(exact, half) < 3
    assert 0 < difference(exact, rounded) < 8


def test_typed_prompts_make_pictures_until_an_empty_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        "a red star --w 64 --d 5",
        "a red star --d 5",
        "a star --m 1",
        "--x",
        "a red star --s 2 --d 5",
        "",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    with caplog.at_level(logging.ERROR):
        pictures = run("--interactive", "--offload")
    assert [picture.shape[:2] for picture in pictures] == [(64, 64)] * 3
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    assert [re.sub(";.*", "", message) for message in caplog.messages] == [
        "1 multipliers for 0 LoRA files",
        "--x is not an option",
    ]


def test_files_that_do_not_fit_are_named(
    run: Run, small_flux: FluxDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(small_flux.transformer().read_bytes()[:100_000])
    for words, said in (
        (["--ckpt_path", str(half)], "half.safetensors is cut short"),
        (["--ckpt_path", str(small_flux.transformer("chroma"))], "use --model_type chroma"),
        (["--ae", str(small_flux.clip_l)], "not an autoencoder"),
        (["--t5xxl", str(small_flux.ae)], "--t5xxl"),
        (["--clip_l", str(small_flux.t5xxl)], "--clip_l"),
    ):
        caplog.clear()
        assert run(*words, code=1) == []
        assert said in caplog.text and len(caplog.messages) == 1
