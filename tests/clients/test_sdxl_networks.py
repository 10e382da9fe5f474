"""Networks train on SDXL, ours and those of LyCORIS, and their files have the names that other programs know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo_sdxl_folder import SdxlDemo
from library.files.weights import open_weights
from library.train.key_check import check_network_file
from networks import lora
from networks.core.key_names import with_own_names
from networks.core.network import LoraNetwork, read_network_weights
from tests.clients.sdxl_training import SmallSdxlTrainer, train_sdxl

LYCORIS = [
    ("lokr", "full", "lokr_w1"),
    ("loha", "attn-mlp", "hada_w1_a"),
    ("locon", "full", "lora_down.weight"),
]
"""Algorithm, which layers, and what every adapter in a file has; `full` is what LyCORIS does if nothing is said."""
OURS = [
    ("networks.loha", ["conv_dim=2"], "hada_w1_a"),
    ("networks.lokr", ["factor=4"], "lokr_w1"),
    ("networks.oft", ["enable_conv=True"], "oft_blocks"),
    ("networks.lora", ["dora_wd=True", "conv_dim=2"], "dora_scale"),
]

LORA_IN_THE_END = [
    ("networks.dylora", ["unit=2", "conv_dim=4"], 1),
    ("networks.lora_fa", ["conv_dim=2"], 1),
    ("networks.lora", ["pissa=True"], 2),
]
"""Module, arguments, and how many times the rank its file has; all of them are written as plain LoRA."""


def prefixes(file: Path) -> set[str]:
    with open_weights(file) as opened:
        return {key.partition("_text_model_")[0] for key in opened.keys() if key.startswith("lora_te")}


def moved(early: Path, late: Path, end: str) -> bool:
    with open_weights(early) as first, open_weights(late) as last:
        keys = [key for key in last.keys() if key.endswith(end) and "unet" in key]
        return bool(keys) and all(not torch.equal(first.read(key), last.read(key)) for key in keys)


def checked(trainer: SmallSdxlTrainer, file: Path) -> None:
    """Every key has a place in a model that no network stands in."""
    arch = trainer.arch
    cpu = torch.device("cpu")
    layers = arch.adaptable_layers(arch.load_denoiser(torch.float32, cpu), arch.load_text_encoders(torch.float32, cpu))
    check_network_file(file, layers)


@pytest.mark.parametrize(("algorithm", "preset", "part"), LYCORIS)
def test_lycoris_trains_and_every_key_of_its_file_has_a_place(
    small_sdxl: SdxlDemo, tmp_path: Path, algorithm: str, preset: str, part: str
) -> None:
    arguments = ["--network_args", f"algo={algorithm}", f"preset={preset}", "conv_dim=2"]
    words = ["--network_module", "lycoris.kohya", "--max_train_steps", "2", "--save_every_n_steps", "1"]
    trainer = train_sdxl(small_sdxl, tmp_path, *words, *arguments)
    assert trainer.state.step == 2
    last = tmp_path / "small.safetensors"
    checked(trainer, last)
    assert prefixes(last) == {"lora_te1", "lora_te2"}
    assert moved(tmp_path / "small-step00000001.safetensors", last, part)


def test_a_network_that_knows_one_rate_is_not_given_two(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    words = ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr"]
    with pytest.raises(ValueError, match="lycoris.kohya takes one learning rate for all text encoders.*0.0001 and"):
        train_sdxl(small_sdxl, tmp_path, *words, "--text_encoder_lr", "1e-4", "2e-5")


@pytest.mark.parametrize(("module", "args", "end"), OURS, ids=[f"{row[0]} {row[1][0]}" for row in OURS])
def test_kinds_of_networks_train_and_every_key_of_its_file_has_a_place(
    small_sdxl: SdxlDemo, tmp_path: Path, module: str, args: list[str], end: str
) -> None:
    words = ["--network_module", module, "--network_alpha", "1", "--network_args", *args]
    trainer = train_sdxl(small_sdxl, tmp_path, *words, "--max_train_steps", "2", "--save_every_n_steps", "1")
    last = tmp_path / "small.safetensors"
    checked(trainer, last)
    assert prefixes(last) == (set() if module == "networks.oft" else {"lora_te1", "lora_te2"})
    assert moved(tmp_path / "small-step00000001.safetensors", last, end)


def test_both_forms_of_two_rates_train_the_same_network(
    small_sdxl: SdxlDemo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = []
    for name, words in (
        ("list", ["--text_encoder_lr", "1e-4", "0"]),
        ("numbers", ["--text_encoder_lr1", "1e-4", "--text_encoder_lr2", "0"]),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            train_sdxl(small_sdxl, tmp_path / name, *words)
        assert "textencoder 1" in caplog.text and "0.0001" in caplog.text
        captions = next(text for text in caplog.messages if text.startswith("captions as they are read"))
        assert captions.count("01_orange_circle.png") == 1, "both encoders read the same tokens: one line says it"
        assert "textencoder 2: the learning rate is 0" in caplog.text
        files.append(tmp_path / name / "small.safetensors")
        assert prefixes(files[-1]) == {"lora_te1"}
    with open_weights(files[0]) as first, open_weights(files[1]) as second:
        assert first.metadata["ss_text_encoder_lr"] == second.metadata["ss_text_encoder_lr"] == "[0.0001, 0.0]"
        assert all(torch.equal(first.read(key), second.read(key)) for key in first.keys())


def test_training_goes_on_from_a_file_with_the_names_of_diffusers_and_merges_one(
    small_sdxl: SdxlDemo, tmp_path: Path
) -> None:
    trainer = train_sdxl(small_sdxl, tmp_path / "first")
    network: LoraNetwork = trainer.trained.network
    ours = tmp_path / "first" / "small.safetensors"
    theirs = tmp_path / "theirs.safetensors"
    renamed = with_own_names(read_network_weights(ours), {own: other for other, own in network.other_names.items()})
    network.write_weights(renamed, theirs, None)
    start = ["--network_weights", "--base_weights"]
    results = []
    for name, file in (("ours", ours), ("theirs", theirs)):
        words = [word for flag in start for word in (flag, str(file))]
        train_sdxl(small_sdxl, tmp_path / name, *words, "--dim_from_weights", "--base_weights_multiplier", "0.5")
        results.append(read_network_weights(tmp_path / name / "small.safetensors"))
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert any(not torch.equal(results[0][key], value) for key, value in read_network_weights(ours).items())


@pytest.mark.parametrize(("module", "args", "times"), LORA_IN_THE_END, ids=["DyLoRA", "LoRA-FA", "PiSSA"])
def test_what_is_lora_in_the_end_answers_elsewhere_as_it_did_in_training(
    small_sdxl: SdxlDemo, tmp_path: Path, module: str, args: list[str], times: int
) -> None:
    words = ["--network_module", module, "--network_args", *args, "--network_train_unet_only"]
    trainer = train_sdxl(small_sdxl, tmp_path, *words, "--max_train_steps", "1", "--unet_lr", "1e-2")
    denoiser, network = trainer.models.denoiser, trainer.trained.network
    file = tmp_path / "small.safetensors"
    checked(trainer, file)
    weights = read_network_weights(file)
    down = weights["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight"]
    assert down.shape[0] == 4 * times and prefixes(file) == set()
    random = torch.Generator().manual_seed(0)
    x, shape = torch.randn(1, 4, 8, 8, generator=random), denoiser.shape
    context = torch.randn(1, 77, shape.context_dim, generator=random)
    arguments = (x, torch.tensor([301]), context, torch.randn(1, shape.vector_dim, generator=random))
    network.eval()
    with torch.no_grad():
        trained = denoiser(*arguments)
        with network.off():
            plain = denoiser(*arguments)
    assert (trained - plain).abs().max() > 1e-3
    for merged in (False, True):
        unet = trainer.arch.load_denoiser(torch.float32, torch.device("cpu"))
        elsewhere, _ = lora.create_network_from_weights(1.0, str(file), None, [], unet, for_inference=True)
        if merged:
            elsewhere.merge_to([], unet, weights)
        else:
            elsewhere.apply_to([], unet)
            elsewhere.load_weights(file)
        elsewhere.eval()
        with torch.no_grad():
            assert torch.allclose(unet(*arguments), trained, atol=2e-4, rtol=2e-3)
