"""A network trains what it was told to, and its files hold what was trained."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from networks.core.adapter import Dropout
from networks.core.key_names import AdapterShape
from networks.core.network import LoraNetwork
from networks.core.parameter_groups import LoraPlus
from networks.core.targets import Target


def models() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    torch.manual_seed(0)
    encoder = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    unet = nn.ModuleDict({"c": nn.Linear(6, 4), "d": nn.Conv2d(3, 4, 3, padding=1), "e": nn.Conv2d(3, 4, 1)})
    return encoder.requires_grad_(False), unet.requires_grad_(False)


def network_on(encoder: nn.Module, unet: nn.Module, rank: int = 2, **options) -> LoraNetwork:
    shape = AdapterShape(rank, 1.0)
    text = [Target(f"lora_te_{name}", encoder, name, shape) for name in "ab"]
    image = [Target(f"lora_unet_{name}", unet, name, shape) for name in "cde"]
    return LoraNetwork([text], image, **options)


def applied(**options) -> tuple[LoraNetwork, nn.ModuleDict, nn.ModuleDict]:
    encoder, unet = models()
    network = network_on(encoder, unet, **options)
    network.apply_to(encoder, unet)
    for adapter in [*network.text_encoder_loras, *network.unet_loras]:
        nn.init.normal_(adapter.lora_up.weight)
    return network, encoder, unet


def test_keys_come_in_order_text_encoder_first() -> None:
    network, _, _ = applied()
    keys = list(network.state_dict_for_saving())
    assert keys[:3] == ["lora_te_a.alpha", "lora_te_a.lora_down.weight", "lora_te_a.lora_up.weight"]
    assert keys[-1] == "lora_unet_e.lora_up.weight"
    assert len(keys) == 15


def test_a_part_that_is_left_out_has_no_parameters() -> None:
    encoder, unet = models()
    network = network_on(encoder, unet)
    network.apply_to(encoder, unet, apply_text_encoder=False)
    assert type(encoder["a"]) is nn.Linear
    assert len(list(network.parameters())) == 6
    assert not any(key.startswith("lora_te") for key in network.state_dict_for_saving())


def test_multiplier_and_off_change_the_answer_and_come_back() -> None:
    network, encoder, _ = applied()
    x = torch.randn(2, 6)
    full = encoder["a"](x)
    with network.off():
        plain = encoder["a"](x)
        with network.off():
            assert torch.equal(encoder["a"](x), plain)
        assert torch.equal(encoder["a"](x), plain)
    network.set_multiplier(0.5)
    assert torch.allclose(encoder["a"](x) - plain, 0.5 * (full - plain), atol=1e-6)
    network.set_multiplier(torch.tensor([1.0, 0.0]))
    rows = encoder["a"](x)
    assert torch.allclose(rows, torch.stack([full[0], plain[1]]), atol=1e-6)
    network.set_multiplier(1.0)
    assert torch.equal(encoder["a"](x), full)


def test_off_comes_back_after_an_error() -> None:
    network, _, _ = applied()
    with pytest.raises(KeyError), network.off():
        raise KeyError
    assert network.strength.enabled


def test_parameter_groups_have_their_own_rates() -> None:
    network, _, _ = applied(lora_plus=LoraPlus(text_encoder=None, unet=4.0))
    groups, names = network.prepare_optimizer_params([1e-4], 2e-4, 5e-4)
    assert names == ["textencoder", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 2e-4, 8e-4])
    assert [len(group["params"]) for group in groups] == [4, 3, 3]


@pytest.mark.parametrize(
    ("text", "unet", "default", "names"),
    [
        (None, None, 1e-3, ["textencoder", "unet"]),
        ([], None, 1e-3, ["textencoder", "unet"]),
        (0, 1e-3, 1e-3, ["unet"]),
        (1e-3, 0.0, 1e-3, ["textencoder"]),
        (None, 1e-3, None, ["unet"]),
    ],
)
def test_a_missing_rate_is_the_default_and_zero_is_no_group(text, unet, default, names) -> None:
    network, _, _ = applied()
    assert network.prepare_optimizer_params_with_multiple_te_lrs(text, unet, default)[1] == names


def test_a_part_with_rate_zero_is_not_trained_not_saved_and_said(caplog: pytest.LogCaptureFixture) -> None:
    network, encoder, unet = applied()
    x = torch.randn(2, 6)
    with network.off():
        plain = encoder["a"](x)
    with caplog.at_level(logging.WARNING):
        network.prepare_optimizer_params(0, 1e-4)
    network.prepare_grad_etc(encoder, unet)
    assert len(list(network.get_trainable_params())) == 6
    assert all(key.startswith("lora_unet") for key in network.state_dict_for_saving())
    assert torch.equal(encoder["a"](x), plain)
    assert "textencoder: the learning rate is 0" in caplog.text


def test_a_part_with_rate_zero_is_kept_when_it_came_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "first.safetensors"
    applied()[0].save_weights(file, None, None)
    network, _, _ = applied()
    network.load_weights(file)
    network.prepare_optimizer_params(0, 1e-4)
    saved = network.state_dict_for_saving()
    assert torch.equal(saved["lora_te_a.lora_up.weight"], load_file(file)["lora_te_a.lora_up.weight"])
    assert len(saved) == 15


def test_two_encoders_may_have_rates_of_their_own() -> None:
    encoder, unet = models()
    shape = AdapterShape(2, 1.0)
    encoders = [[Target(f"lora_te{i}_{name}", encoder, name, shape)] for i, name in ((1, "a"), (2, "b"))]
    network = LoraNetwork(encoders, [])
    network.apply_to([encoder, encoder], unet)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 0.0, 1e-3)
    assert (names, [group["lr"] for group in groups]) == (["textencoder 1", "textencoder 2"], [1e-4, 2e-4])
    assert network.prepare_optimizer_params([1e-4], 0.0)[1] == ["textencoder"]
    with pytest.raises(ValueError, match="--text_encoder_lr has 3 rates and the model has 2"):
        network.prepare_optimizer_params([1e-4, 2e-4, 3e-4], 0.0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"network{suffix}"
    network, _, _ = applied()
    network.save_weights(str(file), torch.float16, {"ss_steps": "3"})
    other, _, _ = applied()
    other.load_weights(file)
    for key, value in other.state_dict_for_saving(torch.float16).items():
        assert value.dtype == torch.float16
        assert torch.equal(value, network.state_dict_for_saving(torch.float16)[key])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_has_metadata_and_hashes_and_the_callers_metadata_stays(tmp_path: Path) -> None:
    file, metadata = tmp_path / "network.safetensors", {"ss_steps": "3"}
    network, _, _ = applied()
    network.save_weights(file, torch.bfloat16, metadata)
    assert metadata == {"ss_steps": "3"}
    with safe_open(file, "pt") as opened:
        written = opened.metadata()
        assert opened.get_tensor("lora_te_a.alpha").dtype == torch.bfloat16
    assert (written["ss_steps"], len(written["sshs_model_hash"]), len(written["sshs_legacy_hash"])) == ("3", 64, 8)


def test_a_file_without_alpha_has_the_rank_as_alpha(tmp_path: Path) -> None:
    network, _, _ = applied()
    tensors = {key: value for key, value in network.state_dict_for_saving().items() if not key.endswith("alpha")}
    network.write_weights(tensors, tmp_path / "a.safetensors", None)
    other, _, _ = applied()
    other.load_weights(tmp_path / "a.safetensors")
    assert {adapter.scale for adapter in other.unet_loras} == {1.0}
    assert other.state_dict_for_saving()["lora_unet_c.alpha"].item() == 2.0


def test_tensors_of_linear_layers_and_1x1_convolutions_are_read_for_each_other(tmp_path: Path) -> None:
    network, _, _ = applied()
    tensors = network.state_dict_for_saving()
    swapped = {
        key: value.flatten(1)
        if "unet_e" in key and value.dim() == 4
        else value[:, :, None, None]
        if "unet_c" in key and value.dim() == 2
        else value
        for key, value in tensors.items()
    }
    assert swapped["lora_unet_c.lora_up.weight"].shape == (4, 2, 1, 1)
    network.write_weights(swapped, tmp_path / "a.safetensors", None)
    other, _, _ = applied()
    other.load_weights(tmp_path / "a.safetensors")
    for key, value in other.state_dict_for_saving().items():
        assert torch.equal(value, tensors[key])


def test_files_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, _, _ = applied()
    tensors = network.state_dict_for_saving()
    big = tmp_path / "big.safetensors"
    applied(rank=3)[0].save_weights(big, None, None)
    with pytest.raises(
        ValueError, match="big.safetensors: lora_te_a has rank 3 and the network has rank 2.*network_dim"
    ):
        network.load_weights(big)
    wide = tmp_path / "wide.safetensors"
    network.write_weights(tensors | {"lora_te_a.lora_down.weight": torch.zeros(2, 9)}, wide, None)
    with pytest.raises(ValueError, match="wide.safetensors does not fit this model"):
        network.load_weights(wide)
    foreign = tmp_path / "foreign.safetensors"
    network.write_weights({"unet.x.lora_A.weight": torch.zeros(2, 9)}, foreign, None)
    with pytest.raises(ValueError, match="PEFT or diffusers"):
        network.load_weights(foreign)
    part = tmp_path / "part.safetensors"
    some = {key: value for key, value in tensors.items() if "lora_te" in key}
    network.write_weights(some | {"lora_te_zzz.alpha": torch.ones(())}, part, None)
    with caplog.at_level(logging.WARNING):
        result = network.load_weights(part)
    assert len(result.missing_keys) == 9
    assert "9 keys are missing in it" in caplog.text
    assert "1 keys are not of this network, such as lora_te_zzz.alpha" in caplog.text


def test_merging_equals_applying() -> None:
    network, encoder, unet = applied(multiplier=0.7)
    x, image = torch.randn(3, 6), torch.randn(2, 3, 5, 5)
    expected = [encoder["a"](x), unet["c"](x), unet["d"](image), unet["e"](image)]
    weights = network.state_dict_for_saving()
    encoder, unet = models()
    network_on(encoder, unet, multiplier=0.7).merge_to(encoder, unet, weights, None, "cpu")
    merged = [encoder["a"](x), unet["c"](x), unet["d"](image), unet["e"](image)]
    for ours, theirs in zip(merged, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_large_norms_are_brought_down_to_the_limit_and_small_ones_stay() -> None:
    network, _, _ = applied()
    small = network.unet_loras[0]
    with torch.no_grad():
        small.lora_up.weight.mul_(1e-3)
    before = small.lora_up.weight.clone()
    scaled, mean, largest = network.apply_max_norm_regularization(0.5)
    assert scaled == 4
    assert largest == pytest.approx(0.5, rel=1e-5)
    norms = [
        (adapter.scale * adapter.lora_up.weight.flatten(1) @ adapter.lora_down.weight.flatten(1)).norm().item()
        for adapter in [*network.text_encoder_loras, *network.unet_loras]
    ]
    assert sorted(norms)[1:] == pytest.approx([0.5] * 4, rel=1e-4)
    assert mean == pytest.approx(sum(norms) / 5, rel=1e-4)
    assert torch.equal(small.lora_up.weight, before)


def test_a_fresh_network_has_nothing_to_scale() -> None:
    encoder, unet = models()
    network = network_on(encoder, unet)
    assert network.apply_max_norm_regularization(1.0) == (0, 0.0, 0.0)
    assert all(torch.isfinite(adapter.lora_down.weight).all() for adapter in network.unet_loras)


def test_modules_sit_out_steps_by_chance_that_a_seed_repeats() -> None:
    network, encoder, unet = applied(dropout=Dropout(module=0.5))
    network.on_epoch_start(encoder, unet)

    def drawn(seed: int) -> list[bool]:
        network.seed_step(seed)
        network.on_step_start()
        return [adapter.skipped for adapter in [*network.text_encoder_loras, *network.unet_loras]]

    draws = [drawn(seed) for seed in range(200)]
    assert 0.4 < sum(map(sum, draws)) / 1000 < 0.6
    assert drawn(7) == draws[7]
    assert draws[0] != draws[1]
