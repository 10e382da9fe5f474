from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lycoris.kohya import create_network
from torch import nn

from demo_folder import DemoFolder
from library.files.weights import save_safetensors
from library.train.key_check import check_keys, check_network_file, orphans
from tests.clients.continuing import TinyRuns
from tests.clients.training import SmallTrainer, small_settings, train

LAYERS = {"lora_unet_a": (6, 4), "lora_unet_conv": (6, 4, 3, 3), "lora_te_norm": (5,)}


def lora(name: str, out: int, inputs: int, rank: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_down.weight": (rank, inputs), f"{name}.lora_up.weight": (out, rank), f"{name}.alpha": ()}


def test_complete_adapters_of_every_kind_have_a_place() -> None:
    kinds = {
        "LoRA": lora("lora_unet_a", 6, 4),
        "convolution": {
            "lora_unet_conv.lora_down.weight": (2, 4, 3, 3),
            "lora_unet_conv.lora_up.weight": (6, 2, 1, 1),
            "lora_unet_conv.alpha": (),
        },
        "Tucker": {
            "lora_unet_conv.lora_down.weight": (2, 4, 1, 1),
            "lora_unet_conv.lora_mid.weight": (2, 2, 3, 3),
            "lora_unet_conv.lora_up.weight": (6, 2, 1, 1),
        },
        "LoKr": {"lora_unet_a.lokr_w1": (2, 2), "lora_unet_a.lokr_w2": (3, 2), "lora_unet_a.alpha": ()},
        "LoKr of low rank": {
            "lora_unet_a.lokr_w1_a": (2, 1),
            "lora_unet_a.lokr_w1_b": (1, 2),
            "lora_unet_a.lokr_w2_a": (3, 1),
            "lora_unet_a.lokr_w2_b": (1, 2),
        },
        "LoKr with a core": {
            "lora_unet_conv.lokr_w1": (2, 2),
            "lora_unet_conv.lokr_t2": (5, 5, 3, 3),
            "lora_unet_conv.lokr_w2_a": (5, 3),
            "lora_unet_conv.lokr_w2_b": (5, 2),
        },
        "LoHa": {f"lora_unet_a.hada_w{n}_{end}": size for n in (1, 2) for end, size in (("a", (6, 2)), ("b", (2, 4)))},
        "LoHa with a core": {
            **{f"lora_unet_conv.hada_t{n}": (5, 5, 3, 3) for n in (1, 2)},
            **{f"lora_unet_conv.hada_w{n}_{end}": (5, size) for n in (1, 2) for end, size in (("a", 6), ("b", 4))},
        },
        "OFT": {"oft_unet_a.oft_blocks": (2, 3, 3), "oft_unet_a.alpha": ()},
        "OFT of a convolution": {"oft_unet_conv.oft_blocks": (2, 3, 3), "oft_unet_conv.alpha": ()},
        "DoRA": lora("lora_unet_a", 6, 4) | {"lora_unet_a.dora_scale": (1, 4)},
        "OFT of LyCORIS": {"lora_unet_a.oft_blocks": (3, 2, 2), "lora_unet_a.rescale": (6, 1)},
        "BOFT": {"lora_unet_a.oft_blocks": (2, 3, 2, 2)},
        "full": {"lora_unet_a.diff": (6, 4), "lora_unet_a.diff_b": (6,)},
        "norm": {"lora_te_norm.w_norm": (5,), "lora_te_norm.b_norm": (5,)},
    }
    for kind, keys in kinds.items():
        assert orphans(keys, LAYERS) == {}, kind


@pytest.mark.parametrize(
    ("keys", "orphan", "why"),
    [
        (lora("lora_unet_b", 6, 4), "lora_unet_b.alpha", "no layer"),
        (lora("unet_a", 6, 4), "unet_a.lora_up.weight", "no layer"),
        ({"lora_unet_a.lora_down.weight": (2, 4)}, "lora_unet_a.lora_down.weight", "not complete"),
        (lora("lora_unet_a", 6, 4) | {"lora_unet_a.scale": ()}, "lora_unet_a.scale", "no such part"),
        (lora("lora_unet_a", 6, 5), "lora_unet_a.lora_down.weight", r"\[6, 5\] to a layer of shape \[6, 4\]"),
        (lora("lora_unet_a", 4, 6), "lora_unet_a.lora_down.weight", r"\[4, 6\] to a layer of shape \[6, 4\]"),
        (lora("lora_unet_a", 6, 4) | {"lora_unet_a.lora_up.weight": (6, 3)}, "lora_unet_a.lora_up.weight", "rank"),
        ({"lora_unet_a.lokr_w1": (2, 2), "lora_unet_a.lokr_w2": (2, 2)}, "lora_unet_a.lokr_w1", r"shape \[4, 4\]"),
        ({"lora_unet_a.lokr_w1": (2, 2), "lora_unet_a.lokr_w2_a": (3, 1)}, "lora_unet_a.lokr_w2_a", "no lokr_w2_b"),
        (
            {f"lora_unet_a.hada_w{n}_{end}": (6, 2) if end == "a" else (n, 4) for n in (1, 2) for end in "ab"},
            "lora_unet_a.hada_w1_a",
            "rank is not that of hada_w1_b",
        ),
        ({"oft_unet_a.oft_blocks": (2, 2, 2)}, "oft_unet_a.oft_blocks", "do not turn the outputs"),
        ({"oft_unet_b.oft_blocks": (2, 3, 3)}, "oft_unet_b.oft_blocks", "no layer"),
        (lora("oft_unet_a", 6, 4), "oft_unet_a.alpha", "no layer"),
        ({"lora_unet_a.lora_A.weight": (2, 4)}, "lora_unet_a.lora_A.weight", "unknown kind"),
    ],
)
def test_an_orphan_is_named_with_the_reason(keys: dict[str, tuple[int, ...]], orphan: str, why: str) -> None:
    assert orphan in orphans(keys, LAYERS)
    with pytest.raises(ValueError, match=f"(?s)the file: .*{orphan}.*{why}"):
        check_keys(keys, LAYERS, "the file")


def test_the_layers_of_the_model_are_those_of_the_recorded_keys(small_sd: DemoFolder, facts: Path) -> None:
    """The small model has fewer blocks than the published one, so it is its names that are looked up there."""
    trainer = SmallTrainer(small_settings(small_sd, Path("unused")))
    trainer.start()
    cpu = torch.device("cpu")
    denoiser = trainer.arch.load_denoiser(torch.float32, cpu)
    layers = trainer.arch.adaptable_layers(denoiser, trainer.arch.load_text_encoders(torch.float32, cpu))
    recorded = json.loads((facts / "lora_keys" / "sd15_locon.json").read_text(encoding="utf-8"))
    names = {key.partition(".")[0] for key in recorded["keys"]}
    small = {name for name in names if name in layers}
    assert len([name for name in small if name.startswith("lora_te_")]) >= 12
    assert len([name for name in small if name.startswith("lora_unet_")]) >= 100
    assert layers["lora_unet_conv_in"][1:] == (4, 3, 3)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "diag-oft", "boft", "glora", "full", "ia3", "dylora"])
def test_what_lycoris_writes_has_a_place(algorithm: str) -> None:
    class Transformer2DModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k, self.to_v = nn.Linear(16, 32), nn.Linear(16, 16)

    unet = nn.ModuleDict({"block": Transformer2DModel()})
    network = create_network(1.0, 4, 1.0, None, [], unet, algo=algorithm, preset="unet-only")
    network.apply_to([], unet, False, True)
    keys = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert keys
    assert orphans(keys, {"lora_unet_block_to_k": (32, 16), "lora_unet_block_to_v": (16, 16)}) == {}


def test_a_written_file_is_reopened(tmp_path: Path) -> None:
    keys = {key: torch.zeros(shape) for key, shape in lora("lora_unet_a", 6, 4).items()}
    save_safetensors(keys, tmp_path / "m.safetensors")
    check_network_file(tmp_path / "m.safetensors", LAYERS)
    with pytest.raises(ValueError, match=r"m\.safetensors: 3 of 3 keys"):
        check_network_file(tmp_path / "m.safetensors", {})


def test_a_run_whose_keys_nobody_knows_ends_before_its_first_step(small_sd: DemoFolder, tmp_path: Path) -> None:
    class Renamed(SmallTrainer):
        def check_network(self, network) -> None:
            self.layers = {name.replace("attn1", "attention"): shape for name, shape in self.layers.items()}
            super().check_network(network)

    trainer = Renamed(small_settings(small_sd, tmp_path))
    with pytest.raises(ValueError, match=r"the file of this network: \d+ of 612 keys.*attn1_to_"):
        trainer.train()
    assert trainer.state.step == 0


def test_a_saved_orphan_ends_the_run_at_the_next_step(small_sd: DemoFolder, tmp_path: Path) -> None:
    class Forgetful(SmallTrainer):
        def check_file(self, path: Path) -> None:
            self.layers = {name: shape for name, shape in self.layers.items() if "mid_block" not in name}
            super().check_file(path)

    words = TinyRuns(small_sd, tmp_path).words(
        "--save_every_n_steps", "4", "--max_train_steps", "12", "--cache_latents"
    )
    trainer = Forgetful(small_settings(small_sd, tmp_path, *words))
    with pytest.raises(ValueError, match=r"small-step00000004\.safetensors: .*lora_unet_mid_block"):
        trainer.train()
    assert trainer.state.step < 10


def test_a_trained_file_passes(small_sd: DemoFolder, tmp_path: Path) -> None:
    trainer = train(small_sd, tmp_path, "--max_train_steps", "1")
    trainer.check_file(tmp_path / "small.safetensors")
