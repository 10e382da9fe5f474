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
from library.models.flux.model import FluxShape
from library.models.flux.picture_flags import FLUX_PICTURES, PICTURE_RULES
from tests.clients.flux_training import train_flux
from tests.library.models.flux import small

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


@pytest.fixture(scope="module")
def lora(small_flux: FluxDemo, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA on the transformer and on both text encoders, in parts and in layers before the blocks."""
    folder = tmp_path_factory.mktemp("lora")
    args = ["train_t5xxl=True", "split_qkv=True", "in_dims=[2,2,2,2,2]", "network_reg_dims=txt_mlp=2"]
    train_flux(small_flux, folder, "--learning_rate", "3e-2", "--network_args", *args)
    return str(folder / "small.safetensors")


def test_a_lora_counts_as_strongly_as_its_multiplier_says_standing_or_merged(run: Run, lora: str) -> None:
    (plain,), (half,), (full,) = (
        run(*words) for words in ([], ["--lora_weights", f"{lora};0.5"], ["--lora_weights", lora])
    )
    (none,) = run("--lora_weights", f"{lora};0")
    assert np.array_equal(plain, none)
    assert 0.5 < difference(plain, half) < difference(plain, full)
    (twice,) = run("--lora_weights", f"{lora};0.25", f"{lora};0.25")
    assert difference(twice, half) < 0.1
    (merged,) = run("--lora_weights", lora, "--merge_lora_weights")
    assert difference(merged, full) < 0.1
    (rounded,) = run("--lora_weights", lora, "--flux_dtype", "fp8", "--t5xxl_dtype", "fp8")
    assert difference(rounded, full) < difference(rounded, plain)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_the_last_preview_of_a_training_is_the_picture_that_its_file_makes(
    run: Run, small_flux: FluxDemo, tmp_path: Path, kind: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star --w 80 --h 64 --s 3 --d 1 --g 2 --l 3 --n dark", encoding="utf-8")
    words = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--learning_rate", "3e-2"]
    train_flux(small_flux, tmp_path / "out", *words, "--t5xxl_max_token_length", "16", kind=kind)
    (preview,) = (tmp_path / "out" / "sample").glob("*.png")
    words = ["--lora_weights", str(tmp_path / "out" / "small.safetensors"), "--prompt", "a red star"]
    (picture,) = run(*words, "--guidance", "2", "--cfg_scale", "3", "--negative_prompt", "dark", kind=kind)
    assert difference(np.asarray(Image.open(preview)).astype(int), picture) < 0.05


KINDS = {
    "loha": ("networks.loha", []),
    "lokr": ("networks.lokr", ["factor=4"]),
    "oft": ("networks.oft", []),
    "dylora": ("networks.dylora", ["unit=2"]),
    "lora_fa": ("networks.lora_fa", []),
    "dora": ("networks.lora_flux", ["dora_wd=True"]),
    "rslora": ("networks.lora_flux", ["rs_lora=True"]),
    "pissa": ("networks.lora_flux", ["pissa=True"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_networks_of_every_kind_make_pictures_standing_or_merged(
    run: Run, small_flux: FluxDemo, tmp_path: Path, name: str
) -> None:
    module, args = KINDS[name]
    words = ["--network_module", module, "--learning_rate", "3e-2", "--network_train_unet_only"]
    train_flux(small_flux, tmp_path / name, *words, *(["--network_args", *args] if args else []))
    file = str(tmp_path / name / "small.safetensors")
    (plain,), (standing,) = run(), run("--lora_weights", file)
    (merged,) = run("--lora_weights", file, "--merge_lora_weights")
    assert difference(plain, standing) > 0.1
    assert difference(merged, standing) < 0.1 * difference(plain, standing) + 0.05


def test_typed_multipliers_change_the_lora(run: Run, lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a star --d 1\na star --d 1 --m 0\na star --d 1"))
    first, without, again = run("--interactive", "--lora_weights", lora)
    (plain,) = run("--prompt", "a star", "--seed", "1")
    assert np.array_equal(without, plain) and np.array_equal(without, again) and not np.array_equal(first, plain)


def test_what_of_a_lora_fits_no_layer_is_said(run: Run, lora: str, caplog: pytest.LogCaptureFixture) -> None:
    (plain,), (changed,) = run(kind="chroma"), run("--lora_weights", lora, kind="chroma")
    assert not np.array_equal(plain, changed)
    assert "belong to no layer, such as lora_te1_" in caplog.text
    assert "belong to no layer, such as lora_unet_double_blocks_0_img_mod_lin" in caplog.text


def test_a_controlnet_follows_its_picture(run: Run, tmp_path: Path) -> None:
    shape = FluxShape(64, 128, 4, 512, 32, double_blocks=1, single_blocks=0, pooled_dim=64, has_guidance=True)
    net = str(small.write(small.controlnet(shape), tmp_path / "net.safetensors"))

    def steered(colour: str) -> np.ndarray[Any, Any]:
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{colour}.jpg")
        words = ["--controlnet_model_name_or_path", net, "--controlnet_image", str(tmp_path / f"{colour}.jpg")]
        return run(*words, "--dtype", "bf16", "--flux_dtype", "fp8")[0]

    assert not np.array_equal(steered("white"), steered("black"))


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
