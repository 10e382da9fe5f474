"""LyCORIS reads our files of every kind that it knows, and makes the same weights of them."""

from __future__ import annotations

import pytest
import torch
from lycoris.kohya import create_network_from_weights
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from networks.core.adapter import Dropout
from networks.core.key_names import AdapterShape
from networks.core.kinds import Kind, LoHa, LoKr, Lora, known_args
from networks.core.network import LoraNetwork
from networks.core.options import NetworkArgs
from networks.core.targets import Target

KINDS: dict[str, tuple[type[Kind], dict[str, str]]] = {
    "lora": (Lora, {}),
    "rslora": (Lora, {"rs_lora": "True"}),
    "dora": (Lora, {"dora_wd": "True", "wd_on_output": "True"}),
    "pissa": (Lora, {"pissa": "True"}),
    "loha": (LoHa, {}),
    "loha_tucker": (LoHa, {"use_tucker": "True"}),
    "lokr": (LoKr, {"factor": "2"}),
    "lokr_whole": (LoKr, {}),
}


class Transformer2DModel(nn.Module):
    """By the name of this class LyCORIS finds the layers in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in = nn.Conv2d(16, 24, 1)
        self.to_k = nn.Linear(24, 32)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)


@pytest.mark.parametrize("name", list(KINDS))
def test_the_merged_weights_are_the_same(name: str) -> None:
    kind_of, values = KINDS[name]
    kind = kind_of(NetworkArgs(values, known_args(kind_of, ()), name))
    ours, theirs = (nn.ModuleDict({"block": Transformer2DModel()}).requires_grad_(False) for _ in range(2))
    shape = AdapterShape(2, 2.0 if kind_of is LoHa or kind_of is LoKr else 3.0)  # LyCORIS merges these scaled twice
    block = ours["block"]
    targets = [Target(f"lora_unet_block_{layer}", block, layer, shape) for layer in ("proj_in", "to_k", "conv")]
    network = LoraNetwork([], targets, 1.0, Dropout(), None, kind)
    with torch.no_grad():
        for parameter in (p for adapter in network.unet_loras for half in adapter.halves() for p in half):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    weights: dict[str, Tensor] = network.state_dict_for_saving()
    network.merge_to([], ours, weights)

    reader, _ = create_network_from_weights(1.0, None, None, [], theirs, weights_sd=weights)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    reader.merge_to([], theirs, weights, None, None)
    read = dict(theirs.named_parameters())
    for key, value in ours.named_parameters():
        if key.endswith("weight"):
            assert not torch.allclose(read[key], before[key], atol=1e-3), f"{key}: LyCORIS found nothing for it"
        torch.testing.assert_close(read[key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_kronecker_product_with_a_core_is_the_same() -> None:
    # Its reader takes the rank for the size of the second matrix, so its module is made by hand.
    layer = nn.Conv2d(8, 12, 3)
    kind = LoKr(NetworkArgs({"factor": "2", "use_tucker": "True"}, known_args(LoKr, ()), ""))
    target = Target("lora_unet_conv", nn.ModuleDict({"conv": layer}), "conv", AdapterShape(2, 2.0))
    network = LoraNetwork([], [target], 1.0, Dropout(), None, kind)
    with torch.no_grad():
        for parameter in network.unet_loras[0].parameters():
            parameter.normal_()
    tensors = {key.partition(".")[2]: value for key, value in network.state_dict_for_saving().items()}
    theirs = LokrModule("x", layer, 1, 2, 2.0, factor=2, use_tucker=True)
    theirs.load_state_dict(tensors, strict=False)
    merged, _ = theirs.get_merged_weight(1.0)
    network.merge_to([], nn.Module(), network.state_dict_for_saving())
    torch.testing.assert_close(layer.weight, merged, atol=1e-5, rtol=1e-4)
