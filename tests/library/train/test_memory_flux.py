"""The memory flags on whole runs of small FLUX.1 and Chroma models with as many blocks as the flags need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from demo_flux_folder import FluxDemo
from demo_flux_weights import FluxSizes, small_transformer
from library.files.weights import save_safetensors
from tests.clients.flux_training import SmallFluxTrainer, flux_settings, flux_words, train_flux

CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
PREVIEWS = ("--sample_every_n_steps", "1", "--sample_prompts")
PROMPT = "a red star --w 64 --h 64 --s 1 --d 1"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of 4 double and 8 single blocks, and one prompt."""
    folder = tmp_path_factory.mktemp("deep")
    for kind in ("dev", "chroma"):
        save_safetensors(
            small_transformer(FluxSizes(double_blocks=4, single_blocks=8), kind), folder / f"{kind}.safetensors"
        )
    (folder / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Runs of one process may differ in their precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(demo: FluxDemo, deep: Path, output: Path, *words: str, kind: str = "dev") -> dict[str, Tensor]:
    model = ("--pretrained_model_name_or_path", str(deep / f"{kind}.safetensors"))
    train_flux(demo, output, *CACHED, *model, *words, kind=kind)
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_file(output / "small.safetensors")


def ups(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.float().flatten() for key, value in tensors.items() if key.endswith("lora_up.weight")])


def likeness(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return float(torch.nn.functional.cosine_similarity(ups(ours), ups(theirs), dim=0))


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_streaming_and_recomputing_change_no_bit_of_the_result(
    small_flux: FluxDemo, deep: Path, tmp_path: Path, kind: str
) -> None:
    previews = (*PREVIEWS, str(deep / "prompts.txt"))  # passes without a graph between the steps
    expected = trained(small_flux, deep, tmp_path / "plain", *previews, kind=kind)
    assert any("mod_lin" in key for key in expected) == (kind == "dev"), "layers that modulate have adapters"
    for number, words in enumerate(
        (
            "--blocks_to_swap=3",
            "--blocks_to_swap=3 --gradient_checkpointing --cpu_offload_checkpointing",
            "--blocks_to_swap=auto --gradient_checkpointing --cpu_modulation",  # Chroma has no such layers
            "--blocks_to_swap=2 --activation_memory=0.003",
            "--split_mode --blocks_to_swap=1 --activation_memory=auto",
        )
    ):
        found = trained(small_flux, deep, tmp_path / f"{number}", *previews, *words.split(), kind=kind)
        assert all(torch.equal(found[key], expected[key]) for key in expected), words
        assert len(list((tmp_path / f"{number}" / "sample").iterdir())) == 2, words


@pytest.mark.parametrize("network", ["networks.lokr", "networks.lora_flux --network_args dora_wd=True"])
def test_adapters_of_other_kinds_learn_the_same_on_streaming_weights(
    small_flux: FluxDemo, deep: Path, tmp_path: Path, network: str
) -> None:
    words = ["--mixed_precision=bf16", "--network_module", *network.split()]
    expected = trained(small_flux, deep, tmp_path / "plain", *words)
    found = trained(small_flux, deep, tmp_path / "saving", *words, "--blocks_to_swap=3", "--activation_memory=0.004")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_compiled_blocks_share_a_program_for_each_kind_and_have_no_break(
    small_flux: FluxDemo, deep: Path, tmp_path: Path
) -> None:
    half = "--mixed_precision=bf16"
    expected = trained(small_flux, deep, tmp_path / "plain", half)
    torch._dynamo.reset()
    counters.clear()
    compiled = ("--torch_compile", "--dynamo_backend=eager", "--activation_memory=0.004")
    found = trained(small_flux, deep, tmp_path / "compiled", half, *compiled)
    torch._dynamo.reset()
    assert likeness(found, expected) > 0.999
    # Double and single blocks, each for two sizes of picture; the first block of all has inputs without gradients.
    assert 0 < counters["stats"]["unique_graphs"] <= 12 and not counters["graph_break"]


def test_float8_learns_about_the_same_and_scales_are_closer(small_flux: FluxDemo, deep: Path, tmp_path: Path) -> None:
    half = "--mixed_precision=bf16"
    exact = trained(small_flux, deep, tmp_path / "plain", half)
    cast = trained(small_flux, deep, tmp_path / "cast", half, "--fp8_base")
    scaled = trained(small_flux, deep, tmp_path / "scaled", half, "--fp8_scaled")
    swapped = trained(small_flux, deep, tmp_path / "swapped", half, "--fp8_scaled", "--blocks_to_swap=3")
    multiplied = trained(small_flux, deep, tmp_path / "multiplied", half, "--fp8_scaled", "--fp8_matmul")
    assert 0.9 < likeness(cast, exact) < likeness(scaled, exact)
    assert likeness(multiplied, exact) > 0.9
    assert all(torch.equal(swapped[key], scaled[key]) for key in scaled)


def test_layers_that_modulate_are_neither_streamed_nor_on_the_device(
    small_flux: FluxDemo, deep: Path, tmp_path: Path
) -> None:
    words = ["--pretrained_model_name_or_path", str(deep / "dev.safetensors"), "--blocks_to_swap=4", *CACHED]
    rooms = []
    for more in ((), ("--cpu_modulation",)):
        trainer = SmallFluxTrainer(flux_settings(flux_words(small_flux, tmp_path, *words, *more)))
        trainer.start()
        trainer.room.load_denoiser()
        rooms.append(trainer.room)
    plain, ours = rooms
    assert plain.streams is not None and ours.streams is not None and not plain.hosted
    assert len(ours.hosted) == 4 * 2 + 8
    streamed = [sum(room.streams.sizes().values()) for room in rooms]  # type: ignore[union-attr]
    modulating = [layer for layer in ours.hosted if layer.out_features // layer.in_features in (3, 6)]
    assert len(modulating) == len(ours.hosted)
    # Two double blocks of four and four single ones of eight are swapped, and all of the layers are away.
    assert streamed[0] - streamed[1] == sum(layer.weight.nbytes for layer in ours.hosted) / 2


def test_weights_lie_where_and_as_the_flags_say(small_flux: FluxDemo, deep: Path, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", str(deep / "dev.safetensors"), "--mixed_precision=bf16"]
    words += ["--fp8_scaled", "--blocks_to_swap=4", *CACHED]
    trainer = SmallFluxTrainer(flux_settings(flux_words(small_flux, tmp_path, *words)))
    trainer.start()
    denoiser = trainer.room.load_denoiser()
    streams = trainer.room.streams
    assert streams is not None
    assert streams.order == [1, 3, 5, 7, 9, 11] and trainer.room.streamed == streams.order
    formats = {name: p.dtype for name, p in denoiser.named_parameters() if p.dim() == 2}
    inside = {dtype for name, dtype in formats.items() if "_blocks." in name}
    assert inside == {torch.float8_e4m3fn} and formats["img_in.weight"] == torch.bfloat16
    # The weights and their scales: one number as wide as those of the file for each 64 weights.
    double = sum(p.numel() for name, p in denoiser.named_parameters() if "double_blocks.1." in name and p.dim() == 2)
    assert streams.sizes()[1] == pytest.approx(double * (1 + 4 / 64), rel=0.01)


def test_more_blocks_than_the_model_can_swap_are_refused(small_flux: FluxDemo, deep: Path, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", str(deep / "dev.safetensors"), "--blocks_to_swap=6", *CACHED]
    with pytest.raises(ValueError, match="has 4 double and 8 single blocks and can swap 5 at most"):
        train_flux(small_flux, tmp_path, *words)


def test_a_file_in_float8_has_no_numbers_to_scale(small_flux: FluxDemo, tmp_path: Path) -> None:
    tensors = small_transformer(FluxSizes(), "dev")
    file = tmp_path / "fp8.safetensors"
    save_safetensors({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, file)
    words = ["--pretrained_model_name_or_path", str(file), "--mixed_precision=bf16", *CACHED]
    with pytest.raises(ValueError, match="is float8_e4m3fn in the file already"):
        train_flux(small_flux, tmp_path / "scaled", *words, "--fp8_scaled")
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = train_flux(small_flux, tmp_path / "plain", *words, "--fp8_base")
    assert trainer.models.denoiser.get_parameter("double_blocks.0.img_attn.qkv.weight").dtype == torch.float8_e4m3fn


def test_a_dry_run_counts_what_streams_as_being_elsewhere(
    small_flux: FluxDemo, deep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def denoiser(*words: str) -> str:
        caplog.clear()
        caplog.set_level(logging.INFO)
        model = ("--pretrained_model_name_or_path", str(deep / "dev.safetensors"))
        SmallFluxTrainer(flux_settings(flux_words(small_flux, tmp_path, *CACHED, *model, *words))).dry_run()
        (table,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory\n")]
        return next(line for line in table.splitlines() if line.startswith("  denoiser"))

    whole, away = denoiser(), denoiser("--blocks_to_swap=4", "--gradient_checkpointing")
    assert "6 blocks lie in main memory and have 2 buffers here" in away
    assert float(away.split()[1]) < 0.85 * float(whole.split()[1])
