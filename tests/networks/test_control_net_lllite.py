"""ControlNet-LLLite: its names and sizes at full size, how it follows a picture, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.memory.checkpointing import checkpoint_blocks
from library.memory.fp8 import Format, Quantizer, Scaling
from library.memory.frozen_layers import attach_frozen_layers, round_weights
from library.models.sdxl.unet import SdxlUNet, UNetShape
from networks.control_net_lllite import ControlledLinear, ControlNetLLLite, create_network, sizes_in_file

FULL = UNetShape((320, 640, 1280), (0, 2, 10), 10, 2, 2048, 2816, 1280)
SMALL = UNetShape((32, 32, 64), (0, 1, 1), 1, 2, 48, 40, 32)


@pytest.fixture
def unet() -> SdxlUNet:
    torch.manual_seed(0)
    return SdxlUNet(SMALL).eval().requires_grad_(False)


def filled(network: ControlNetLLLite, seed: int = 1) -> ControlNetLLLite:
    """The network with something in its last layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def applied(unet: nn.Module, seed: int = 1, dropout: float | None = None) -> ControlNetLLLite:
    network = filled(create_network(unet, cond_emb_dim=6, network_dim=5, dropout=dropout), seed).eval()
    network.apply_to()
    return network


def inputs(batch: int = 2, size: tuple[int, int] = (8, 12), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, 4, *size), (batch, 7, SMALL.context_dim), (batch, SMALL.vector_dim)]
    x, context, vector = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x, torch.tensor([400] * batch), context, vector]


def picture(batch: int = 2, size: tuple[int, int] = (8, 12), seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, size[0] * 8, size[1] * 8, generator=generator) * 2 - 1


def test_names_shapes_and_depths_at_full_size_are_the_recorded_ones(facts: Path) -> None:
    recorded = json.loads((facts / "lora_keys" / "sdxl_lllite.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = ControlNetLLLite(SdxlUNet(FULL), 32, 64)
    ours = {key: [list(value.shape), "float32"] for key, value in network.state_dict().items()}
    assert len(ours) == recorded["n_keys"] == 1600 and ours == recorded["keys"]
    strides = {name: module.stride for name, module in network.named_children()}
    assert strides == {name: {1: 8, 2: 16, 3: 32}[depth] for name, depth in recorded["depth"].items()}


def test_a_new_network_a_multiplier_of_0_no_picture_and_off_leave_the_model_exactly_as_it_is(unet: SdxlUNet) -> None:
    base = unet(*inputs())
    fresh = create_network(unet, cond_emb_dim=6, network_dim=5)
    fresh.apply_to()
    fresh.set_cond_image(picture())
    assert torch.equal(unet(*inputs()), base)
    network = applied(unet)
    assert torch.equal(unet(*inputs()), base)
    network.set_cond_image(picture())
    changed = unet(*inputs())
    assert (changed - base).abs().max() > 1e-3
    with network.off():
        assert torch.equal(unet(*inputs()), base)
    network.set_multiplier(0.0)
    assert torch.equal(unet(*inputs()), base)
    network.set_multiplier(1.0)
    assert torch.equal(unet(*inputs()), changed)


def test_it_stands_in_the_way_down_and_the_middle_only_and_keeps_the_keys_of_the_model(unet: SdxlUNet) -> None:
    before = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    applied(unet)
    assert {key: tuple(value.shape) for key, value in unet.state_dict().items()} == before
    places = {path for path, module in unet.named_modules() if isinstance(module, ControlledLinear)}
    ends = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")
    assert places == {
        path
        for path, module in unet.named_modules()
        if path.endswith(ends) and path.startswith(("input_blocks", "middle_block"))
    }
    assert len(places) == 20 and isinstance(unet.get_submodule(min(places)), nn.Linear)


def test_one_picture_serves_rows_with_and_without_the_prompt(unet: SdxlUNet) -> None:
    network = applied(unet)
    network.set_cond_image(picture(1))
    both = unet(*inputs(2))
    network.set_cond_image(picture(1).repeat(2, 1, 1, 1))
    torch.testing.assert_close(unet(*inputs(2)), both, atol=1e-5, rtol=1e-5)
    network.set_cond_image(picture(2))
    four = unet(*inputs(4))
    network.set_cond_image(picture(2).repeat(2, 1, 1, 1))
    torch.testing.assert_close(unet(*inputs(4)), four, atol=1e-5, rtol=1e-5)


def test_each_row_follows_its_own_picture_with_its_own_strength(unet: SdxlUNet) -> None:
    network = applied(unet)
    x = inputs()
    network.set_cond_image(picture())
    whole = unet(*x)
    for row in range(2):
        network.set_cond_image(picture()[row : row + 1])
        torch.testing.assert_close(unet(*(value[row : row + 1] for value in x))[0], whole[row], atol=1e-5, rtol=1e-5)
    network.set_cond_image(picture())
    network.set_multiplier(0.5)
    half = unet(*x)
    network.set_multiplier(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(unet(*x), torch.stack([half[0], whole[1]]), atol=1e-5, rtol=1e-5)


def test_maps_of_odd_sides_are_followed_as_well(unet: SdxlUNet) -> None:
    network = applied(unet)
    size = (7, 13)
    network.set_cond_image(picture(1, size))
    assert unet(*inputs(1, size)).isfinite().all()
    padded = picture(1, size)[..., :-8]
    network.set_cond_image(padded)
    with pytest.raises(ValueError, match=r"the conditioning image is 96x56, which is not the size"):
        unet(*inputs(1, (7, 15)))


def test_where_nothing_is_learnt_a_picture_is_embedded_once(unet: SdxlUNet) -> None:
    network = applied(unet)
    calls: list[int] = []
    for module in network.children():
        module.conditioning1.register_forward_hook(lambda *args: calls.append(1))
    network.set_cond_image(picture())
    with torch.no_grad():
        first = unet(*inputs())
        for _ in range(3):
            unet(*inputs())
    assert len(calls) == 20
    network.set_cond_image(picture(seed=4))
    with torch.no_grad():
        assert not torch.equal(unet(*inputs()), first)
    assert len(calls) == 40
    unet(*inputs())  # with a graph, what was computed without one is no use
    assert len(calls) == 60


def test_every_weight_gets_a_gradient_the_same_with_checkpointing_and_dropout(unet: SdxlUNet) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = copy.deepcopy(unet)
        network = applied(model, dropout=0.3).train()
        if checkpointed:
            checkpoint_blocks(model.blocks())
        network.set_cond_image(picture())
        torch.manual_seed(11)
        model(*inputs()).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(grad is not None for grad in found[0].values())
    assert sum(bool(grad.abs().max() > 0) for grad in found[0].values()) > 0.9 * len(found[0])
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_dropout_drops_while_training_only(unet: SdxlUNet) -> None:
    network = applied(unet, dropout=0.5)
    network.set_cond_image(picture())
    assert torch.equal(unet(*inputs()), unet(*inputs()))
    network.train()
    assert not torch.equal(unet(*inputs()), unet(*inputs()))


def test_layers_in_float8_do_their_own_arithmetic(unet: SdxlUNet) -> None:
    round_weights(unet, Quantizer(Format(Scaling.NONE)))
    plain = copy.deepcopy(unet)
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float8_e4m3fn:
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
    attach_frozen_layers(unet, dtype=torch.float32)
    answers = []
    for model in (unet, plain):
        network = applied(model)
        network.set_cond_image(picture())
        answers.append(model(*inputs()))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_about_the_same(unet: SdxlUNet, dtype: torch.dtype) -> None:
    network = applied(unet)
    network.set_cond_image(picture())
    exact = unet(*inputs())
    unet.to(dtype)
    for own in (dtype, torch.float32):
        network.to(own)
        network.set_cond_image(picture())
        answer = unet(*inputs(dtype=dtype))
        assert answer.dtype == dtype
        assert (answer.float() - exact).norm() < 0.05 * exact.norm()


def test_two_networks_follow_a_picture_each(unet: SdxlUNet) -> None:
    first, second = applied(unet, 1), applied(unet, 2)
    first.set_cond_image(picture(seed=3))
    one = unet(*inputs())
    second.set_cond_image(picture(seed=4))
    both = unet(*inputs())
    first.set_cond_image(None)
    other = unet(*inputs())
    assert len({round(float(answer.detach().square().sum()), 3) for answer in (one, both, other)}) == 3
    second.set_cond_image(None)
    first.set_cond_image(picture(seed=3))
    assert torch.equal(unet(*inputs()), one)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
@pytest.mark.parametrize("cond_emb_dim", [6, 7])
def test_a_file_brings_its_sizes_and_every_bit_back(
    unet: SdxlUNet, tmp_path: Path, ending: str, cond_emb_dim: int
) -> None:
    network = filled(create_network(unet, cond_emb_dim=cond_emb_dim, network_dim=5))
    path = tmp_path / f"control.{ending}"
    network.write_weights(network.state_dict(), path, {"modelspec.title": "a"})
    assert sizes_in_file(path) == (cond_emb_dim, 5)
    again = create_network(unet, path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    with pytest.raises(ValueError, match=r"has --network_dim 5, not 64; leave --network_dim out"):
        create_network(unet, path, network_dim=64)


def test_what_is_no_such_network_or_does_not_fit_is_named(unet: SdxlUNet, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"a.safetensors is no ControlNet-LLLite; it holds .*lora_unet_a"):
        create_network(unet, path)
    network = create_network(unet, cond_emb_dim=6, network_dim=5)
    with pytest.raises(ValueError, match=r"a.safetensors is no ControlNet-LLLite"):
        network.load_weights(path)
    network.write_weights(network.state_dict(), path, {})
    wider = SdxlUNet(UNetShape((32, 64, 64), (0, 1, 1), 1, 2, 48, 40, 32))
    with pytest.raises(ValueError, match=r"does not fit this model: .*lllite_unet_input_blocks"):
        create_network(wider, path)
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"does not fit this model"):
        create_network(unet, path)
    with pytest.raises(ValueError, match="is for the U-Net of Stable Diffusion XL"):
        create_network(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"--cond_emb_dim 1; expected 2 or more"):
        create_network(unet, cond_emb_dim=1)


def test_pictures_that_do_not_fit_the_batch_are_named(unet: SdxlUNet) -> None:
    network = applied(unet)
    with pytest.raises(ValueError, match=r"shape \[3, 8, 8\]; expected \[n, 3, height, width\]"):
        network.set_cond_image(torch.zeros(3, 8, 8))
    network.set_cond_image(picture(2))
    with pytest.raises(ValueError, match="2 conditioning images, or multipliers, for 3 samples"):
        unet(*inputs(3))
