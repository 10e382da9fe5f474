"""LoRA on FLUX: the transformer and its text encoders with adapters, split and whole, merged, nudged by GGPO.

Mended: a split file has alpha in proportion to its joined rank, so that a loader that knows of no parts gets the full
effect; the recorded output of such a loader is met with the recorded alpha.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library.files.weights import save_safetensors
from library.models.flux.checkpoint import load_transformer
from networks import lora_flux
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter, LoraTraining
from networks.core.network import LoraNetwork
from networks.core.perturbation import Ggpo, squared_row_norms

MERGED = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear2.weight")
SPLIT = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1")


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return Case(case, recipe, Path(folder)).outputs()


class Case:
    def __init__(self, case: dict[str, Any], recipe: ModuleType, folder: Path) -> None:
        self.case, self.recipe, self.seed, self.folder = case, recipe, case["seed"], folder
        self.path = folder / "model.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], self.seed), self.path)
        self.given = {
            name: recipe.tensor(name, tuple(entry["shape"]), self.seed)
            if entry["kind"] == "tensor"
            else entry.get("value")
            for name, entry in case["inputs"].items()
        }
        self.dim, self.alpha = self.given["network_dim"], self.given["network_alpha"]

    def outputs(self) -> dict[str, Tensor]:
        return {**self.whole(), **self.split(), **self.text_encoders(), **self.ggpo()}

    def whole(self) -> dict[str, Tensor]:
        model = self.transformer()
        outputs = {"out_plain": self.answer(model)}
        network = self.filled(model, [])
        tensors = network.state_dict_for_saving()
        self.check_keys(tensors, "default_saved_keys")
        assert len(network.unet_loras) == self.case["facts"]["from_weights_modules"]
        outputs["out_default"] = self.answer(model)
        network.set_multiplier(-0.6)
        outputs["out_default_multiplier"] = self.answer(model)
        model = self.transformer()
        merger, _ = lora_flux.create_network_from_weights(0.8, None, None, [], model, tensors, for_inference=True)
        merger.merge_to([], model, tensors)
        outputs["out_merged_0.8"] = self.answer(model)
        weights = model.state_dict()
        return outputs | {f"merged.{key}": weights[key][::16, ::16] for key in MERGED}

    def split(self) -> dict[str, Tensor]:
        model = self.transformer()
        network = self.filled(model, [], split_qkv="True")
        internal = {name: list(value.shape) for name, value in network.named_parameters()}
        assert internal == self.case["facts"]["split_internal"]
        outputs = {"out_split": self.answer(model)}
        tensors = network.state_dict_for_saving()
        self.check_keys(tensors, "split_saved_keys")
        for name in SPLIT:
            outputs[f"split_saved.{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:, ::4]
            outputs[f"split_saved.{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][::8]
        assert torch.allclose(self.answer(self.applied(tensors)), outputs["out_split"], atol=2e-4, rtol=2e-3)
        recorded_alpha = {k: torch.tensor(self.alpha) if k.endswith("alpha") else v for k, v in tensors.items()}
        return outputs | {"out_split_reloaded_unsplit": self.answer(self.applied(recorded_alpha))}

    def text_encoders(self) -> dict[str, Tensor]:
        clip, t5 = self.encoders()
        network = self.filled(nn.Module(), [clip, t5], train_t5xxl="True")
        tensors = network.state_dict_for_saving()
        self.check_keys({key: value for key, value in tensors.items() if "lora_te" in key}, "te_saved_keys")
        entries = self.case["inputs"]
        l_tokens, t5_tokens = (
            self.recipe.token_ids(name, tuple(entry["shape"]), entry["low"], entry["high"], self.seed)
            for name, entry in ((name, entries[name]) for name in ("l_tokens", "t5_tokens"))
        )
        l_tokens[:, 50:] = self.case["config"]["clip"]["vocab_size"] - 1
        mask = torch.zeros_like(t5_tokens)
        for row, length in enumerate(self.given["t5_lengths"]):
            mask[row, :length] = 1
        return {
            "te_l_pooled": clip(l_tokens).pooler_output,
            "te_t5_out": t5(t5_tokens, attention_mask=mask).last_hidden_state,
        }

    def ggpo(self) -> dict[str, Tensor]:
        holder = nn.ModuleDict({"linear": nn.Linear(40, 56)})
        self.fill(holder, "")
        adapter = LoraAdapter(
            holder["linear"], 4, 2.0, Dropout(), Strength(), training=LoraTraining(ggpo=Ggpo(sigma=0.03, beta=0.01))
        )
        assert abs(adapter.perturbation.base_norm - self.case["facts"]["ggpo"]["org_weight_norm_estimate"]) < 1e-6
        self.fill(adapter, "lora_unet_x.")
        stand_in(holder, "linear", adapter)
        x = self.given["ggpo_x"]
        outputs = {"ggpo.first": holder["linear"](x)}
        down, up = adapter.lora_down.weight, adapter.lora_up.weight
        squares = squared_row_norms(up, down)
        outputs["ggpo.weight_norms"] = squares.sqrt()
        outputs["ggpo.combined_weight_norms"] = (adapter.perturbation.base_norm**2 + squares).sqrt()
        # A gradient of `up` alone, one number a row, whose effect on the weight has the recorded norms.
        wanted = self.given["ggpo_grad_norms"].abs() / adapter.scale
        adapter.lora_up.weight.grad = torch.zeros_like(up)
        adapter.lora_up.weight.grad[:, :1] = wanted / down[:1].norm()
        adapter.lora_down.weight.grad = torch.zeros_like(down)
        adapter.follow_gradient()
        torch.manual_seed(4321)
        return outputs | {"ggpo.second": holder["linear"](x)}

    def filled(self, model: nn.Module, encoders: list[nn.Module], **args: str) -> LoraNetwork:
        """A network made from settings, applied, with the recorded weights."""
        network = lora_flux.create_network(1.0, self.dim, self.alpha, None, encoders, model, **args)
        network.apply_to(encoders, model)
        self.fill(network, "")
        return network.eval()

    def fill(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self.recipe.weight(prefix + name, tuple(parameter.shape), self.seed))

    def applied(self, tensors: dict[str, Tensor]) -> nn.Module:
        """The transformer as a loader that knows of no parts sees it with a file."""
        model = self.transformer()
        network, _ = lora_flux.create_network_from_weights(1.0, None, None, [], model, tensors, for_inference=True)
        network.apply_to([], model)
        network.load_state_dict(tensors)
        network.eval()
        return model

    def check_keys(self, tensors: dict[str, Tensor], fact: str) -> None:
        found = {key: [list(value.shape), "float32"] for key, value in tensors.items()}
        assert found == self.case["facts"][fact]

    def transformer(self) -> nn.Module:
        return load_transformer(self.path, "flux", torch.float32, "cpu")

    def answer(self, model: nn.Module) -> Tensor:
        t, guidance = torch.tensor(self.given["timesteps"]), torch.tensor(self.given["guidance"])
        size = tuple(self.given["packed_hw"])
        out: Tensor = model(self.given["img"], self.given["txt"], t, guidance, self.given["y"], size)
        return out

    def encoders(self) -> tuple[nn.Module, nn.Module]:
        """Both text encoders by transformers; CLIP-L with the activation it was recorded with."""
        config = self.case["config"]
        clip = CLIPTextModel(CLIPTextConfig(**config["clip"], hidden_act="gelu", eos_token_id=2))
        weights = self.recipe.state_dict(self.case["clip_checkpoint"], self.seed)
        own = clip.state_dict()
        clip.load_state_dict(
            {k if k in own else k.removeprefix("text_model."): v for k, v in weights.items()}, strict=False
        )
        settings = {**config["t5"], "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
        t5 = T5EncoderModel(T5Config(**settings))
        weights = self.recipe.state_dict(self.case["t5_checkpoint"], self.seed)
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        scaled = {k: v * 0.125 if k.endswith("SelfAttention.q.weight") else v for k, v in weights.items()}
        t5.load_state_dict(scaled, strict=False)
        return clip.eval(), t5.eval()
