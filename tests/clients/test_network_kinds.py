"""Every kind of network trains, goes on bit for bit after a stop, and its file does what the training ended with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from demo_flux_folder import FluxDemo
from demo_flux_weights import FluxSizes, small_transformer
from demo_folder import DemoFolder
from library.files.weights import open_weights, save_safetensors
from networks import lora, lora_flux
from tests.clients.continuing import TinyRuns, tensors
from tests.clients.flux_training import train_flux


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Runs of one process may differ in their precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


KINDS: dict[str, tuple[str, list[str], str]] = {
    "dora": ("networks.lora", ["dora_wd=True"], "dora_scale"),
    "pissa": ("networks.lora", ["pissa=True"], "lora_up.weight"),
    "lora_fa": ("networks.lora_fa", ["conv_dim=2"], "lora_up.weight"),
    "dylora": ("networks.dylora", ["unit=2"], "lora_up.weight"),
    "loha": ("networks.loha", ["conv_dim=2", "use_tucker=True"], "hada_w1_a"),
    "lokr": ("networks.lokr", ["factor=4", "conv_dim=2", "rank_dropout=0.1", "dropout=0.1"], "lokr_w1"),
    "oft": ("networks.oft", ["enable_all_linear=True", "module_dropout=0.2"], "oft_blocks"),
}


def words(name: str) -> list[str]:
    module, args, _ = KINDS[name]
    dim = "2" if name == "loha" else "4"
    return ["--network_module", module, "--network_dim", dim, "--network_alpha", "1", "--network_args", *args]


@pytest.mark.parametrize("name", list(KINDS))
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name: str, small_sd: DemoFolder, tmp_path: Path) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    whole = runs.train("whole", *words(name), "--max_train_steps", "4", "--save_state_on_train_end")
    runs.train("first", *words(name), "--max_train_steps", "2", "--save_state_on_train_end")
    runs.train("second", *words(name), "--max_train_steps", "4", "--resume", runs.state("first"))
    expected, found = runs.weights("whole"), runs.weights("second")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    end = KINDS[name][2]
    early = runs.weights("first")
    assert any(not torch.equal(early[key], expected[key]) for key in expected if key.endswith(end))
    assert the_file_does_what_the_network_did(whole, tmp_path / "whole" / "small.safetensors")


def the_file_does_what_the_network_did(trainer, file: Path) -> bool:
    """The network at the end of training, its file read by networks.lora, and its file merged answer alike."""
    denoiser, network = trainer.models.denoiser, trainer.trained.network
    network.eval()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 77, denoiser.shape.context_dim, generator=torch.Generator().manual_seed(1))
    arguments = (x, torch.tensor([301]), context)
    with torch.no_grad():
        trained = denoiser(*arguments)
        with network.off():
            plain = denoiser(*arguments)
    assert (trained - plain).abs().max() > 1e-5
    answers: list[Tensor] = []
    for merge in (False, True):
        unet = trainer.arch.load_denoiser(torch.float32, torch.device("cpu"))
        reader, weights = lora.create_network_from_weights(1.0, str(file), None, [], unet, for_inference=True)
        if merge:
            reader.merge_to([], unet, weights)
        else:
            reader.apply_to([], unet)
            reader.load_weights(file)
            reader.eval()
        with torch.no_grad():
            answers.append(unet(*arguments))
    return all(torch.allclose(answer, trained, atol=2e-4, rtol=2e-3) for answer in answers)


def test_the_file_of_pissa_is_a_lora_of_twice_the_rank_for_the_original_model(
    small_sd: DemoFolder, tmp_path: Path
) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    runs.train("pissa", *words("pissa"), "--learning_rate", "0", "--unet_lr", "1e-9", "--max_train_steps", "1")
    file = tmp_path / "pissa" / "small.safetensors"
    with open_weights(file) as weights:
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        down, up, alpha = (weights.read(f"{key}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape[0] == up.shape[1] == 8
    assert alpha.item() == 2.0
    assert (up[:, :4] @ down[:4]).norm() > 1  # the principal part is there, and is taken off again
    assert (up @ down).norm() < 1e-3
    runs.train("more", *words("pissa"), "--network_weights", str(file), "--max_train_steps", "1", "--unet_lr", "1e-9")
    again = tensors(tmp_path / "more" / "small.safetensors")
    assert torch.allclose(again[f"{key}.lora_down.weight"], down, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "args", "end"),
    [
        ("networks.lora_flux", ["dora_wd=True"], "dora_scale"),
        ("networks.lora_flux", ["pissa=True", "rs_lora=True"], "lora_up.weight"),
        ("networks.loha", ["train_blocks=single"], "hada_w1_a"),
        ("networks.lokr", ["factor=4", "network_reg_lrs=img_attn=1e-4"], "lokr_w1"),
        ("networks.oft_flux", ["enable_all_linear=False"], "oft_blocks"),
        ("networks.dylora", ["unit=2", "in_dims=4,0,0,0,4"], "lora_up.weight"),
        ("networks.lora_fa", [], "lora_up.weight"),
    ],
)
def test_every_kind_trains_on_flux(
    small_flux: FluxDemo, tmp_path: Path, module: str, args: list[str], end: str
) -> None:
    given = ["--network_args", *args] if args else []
    trainer = train_flux(small_flux, tmp_path, "--network_module", module, "--network_train_unet_only", *given)
    file = tmp_path / "small.safetensors"
    written = tensors(file)
    assert any(key.endswith(end) for key in written)
    weights = trainer.trained.network.state_dict_for_saving()
    assert written.keys() == weights.keys()
    reader, _ = lora_flux.create_network_from_weights(
        1.0, str(file), None, [], trainer.models.denoiser, for_inference=True
    )
    assert {key: value.shape for key, value in reader.state_dict_for_saving().items()} == {
        key: value.shape for key, value in written.items()
    }


def test_a_wrong_argument_is_named_before_anything_is_trained(small_sd: DemoFolder, tmp_path: Path) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    with pytest.raises(ValueError, match="LoKr does not know 'factr'; did you mean 'factor'"):
        runs.train("x", "--network_module", "networks.lokr", "--network_args", "factr=4")
    with pytest.raises(ValueError, match="conv_dim has no effect with --dim_from_weights|does not exist|no such file"):
        runs.train(
            "y", "--network_module", "networks.loha", "--network_args", "conv_dim=4",
            "--dim_from_weights", "--network_weights", str(small_sd.checkpoint),
        )  # fmt: skip
    with pytest.raises(ValueError, match="scale_weight_norms: what OFT adds"):
        runs.train("z", "--network_module", "networks.oft", "--scale_weight_norms", "1", "--network_dim", "4")


@pytest.mark.parametrize("name", ["dora", "loha", "oft"])
def test_streamed_blocks_and_recomputation_change_no_bit(name: str, small_flux: FluxDemo, tmp_path: Path) -> None:
    module, args, _ = KINDS[name]
    args = [arg for arg in args if arg.partition("=")[0] in ("dora_wd", "pissa", "factor", "enable_all_linear")]
    module = module if module != "networks.lora" else "networks.lora_flux"
    given = ["--network_module", module, "--network_train_unet_only", *(["--network_args", *args] if args else [])]
    model = tmp_path / "model.safetensors"
    save_safetensors(small_transformer(FluxSizes(double_blocks=4, single_blocks=6), "dev"), model)
    given += ["--pretrained_model_name_or_path", str(model)]
    found = []
    for kind, more in (("plain", []), ("streamed", ["--blocks_to_swap", "3", "--gradient_checkpointing"])):
        train_flux(small_flux, tmp_path / kind, *given, *more)
        found.append(tensors(tmp_path / kind / "small.safetensors"))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    AcceleratorState._reset_state(reset_partial_state=True)
    half = ("--fp8_base", "--fp8_scaled", "--mixed_precision", "bf16")
    train_flux(small_flux, tmp_path / "rounded", *given, *half)
    rounded = tensors(tmp_path / "rounded" / "small.safetensors")
    assert rounded.keys() == found[0].keys()
    assert all(value.isfinite().all() for value in rounded.values())
