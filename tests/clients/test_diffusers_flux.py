"""diffusers and PEFT read our LoRA files for FLUX.1 and Chroma as we do, and we read theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.models.flux.checkpoint import load_transformer
from networks import convert_flux_lora, lora_flux
from networks.core.network import LoraNetwork
from tests.library.models.flux import small

SMALL = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}
APPROXIMATOR = {"approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 2}
CLOSE = {"atol": 1e-4, "rtol": 0.0}


class Family(NamedTuple):
    """One model as both programs have it."""

    shape: Any
    model_type: str
    pipeline: type[Any]


FAMILIES = {
    "flux": Family(small.DEV, "flux", FluxPipeline),
    "chroma": Family(small.CHROMA, "chroma", ChromaPipeline),
}


class Both:
    """The same weights in our transformer and in diffusers' pipeline, and the same question to each."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        if family.model_type == "flux":
            theirs: Any = FluxTransformer2DModel(**SMALL, pooled_projection_dim=16, guidance_embeds=True)
        else:
            theirs = ChromaTransformer2DModel(**SMALL, **APPROXIMATOR)
        small.with_random_weights(theirs, 3)
        theirs.save_pretrained(folder / "transformer")
        self.folder, self.theirs = folder, theirs.eval().requires_grad_(False)
        torch.manual_seed(0)
        clip = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        self.clip = CLIPTextModel(clip).eval().requires_grad_(False)
        parts = dict.fromkeys(["vae", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder"])
        if family.model_type == "flux":
            parts["text_encoder"] = self.clip
        else:
            del parts["text_encoder_2"], parts["tokenizer_2"]
        self.pipeline = family.pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=self.theirs, **parts)
        self.given = small.inputs(family.shape) | ({} if family.shape.has_guidance else {"guidance": torch.zeros(2)})

    def ours(self) -> nn.Module:
        return load_transformer(self.folder, self.family.model_type, torch.float32, "cpu")

    @torch.no_grad()
    def our_answer(self, model: nn.Module) -> Tensor:
        # Chroma looks at one text token more than there are; with the whole text both programs see all of them.
        lengths = None if self.family.model_type == "flux" else (5, 5)
        answer: Tensor = model(**self.given, lengths=lengths)
        return answer

    @torch.no_grad()
    def their_answer(self) -> Tensor:
        given = self.given
        rows, columns = given["size"]
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
        words = {
            "hidden_states": given["img"],
            "encoder_hidden_states": given["txt"],
            "timestep": given["t"],
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(5, 3),
        }
        if self.family.model_type == "flux":
            words |= {"pooled_projections": given["pooled"], "guidance": given["guidance"]}
        else:
            words["attention_mask"] = torch.ones(2, 5 + rows * columns, dtype=torch.bool)
        answer: Tensor = self.theirs(**words).sample
        return answer

    def with_lora(self, file: Path) -> Tensor:
        """What our transformer answers with a LoRA file."""
        model = self.ours()
        network, weights = lora_flux.create_network_from_weights(1.0, str(file), None, [], model, for_inference=True)
        network.apply_to([], model)
        network.load_state_dict(weights, strict=False)
        network.eval()
        return self.our_answer(model)


def trained(model: nn.Module, encoders: list[nn.Module], **args: str) -> LoraNetwork:
    """A network with an effect that can be seen."""
    network = lora_flux.create_network(1.0, 4, 2.0, None, encoders, model, **args)
    network.apply_to(encoders, model)
    torch.manual_seed(1)
    for adapter in (*network.unet_loras, *network.text_encoder_loras):
        for up in adapter.lora_up.parameters():
            nn.init.normal_(up, std=0.2)
    return network.eval()


def convert(source: Path, src: str, dst: str) -> Path:
    target = source.with_name(f"converted_{dst}.safetensors")
    words = ["--src", src, "--dst", dst, "--src_path", str(source), "--dst_path", str(target)]
    assert convert_flux_lora.main(words) == 0
    return target


@pytest.mark.parametrize("args", [{}, {"split_qkv": "True"}, {"in_dims": "[2,2,2,2,2]"}], ids=["plain", "split", "in"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_pipeline_with_our_converted_lora_answers_as_ours(
    tmp_path: Path, family: str, args: dict[str, str]
) -> None:
    both = Both(FAMILIES[family], tmp_path)
    model = both.ours()
    plain = both.their_answer()
    torch.testing.assert_close(both.our_answer(model), plain, **CLOSE)
    trained(model, [], **args).save_weights(tmp_path / "ours.safetensors", None, {})
    expected = both.our_answer(model)
    both.pipeline.load_lora_weights(str(convert(tmp_path / "ours.safetensors", "sd-scripts", "diffusers")))
    found = both.their_answer()
    assert (found - plain).abs().max() > 0.05, "the LoRA must be seen, or its agreement says nothing"
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(both.with_lora(tmp_path / "ours.safetensors"), expected, **CLOSE)
    back = convert(tmp_path / "converted_diffusers.safetensors", "diffusers", "sd-scripts")
    torch.testing.assert_close(both.with_lora(back), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_their_pipeline_reads_our_file_directly(tmp_path: Path, family: str) -> None:
    # It takes the first layer of single blocks to be that of the published models; the small one is left out.
    both = Both(FAMILIES[family], tmp_path)
    model = both.ours()
    trained(model, [], network_reg_dims="linear1=0").save_weights(tmp_path / "ours.safetensors", None, {})
    plain = both.their_answer()
    both.pipeline.load_lora_weights(str(tmp_path / "ours.safetensors"))
    found = both.their_answer()
    assert (found - plain).abs().max() > 0.05
    torch.testing.assert_close(found, both.our_answer(model), **CLOSE)


def test_their_text_encoder_with_our_converted_lora_answers_as_ours(tmp_path: Path) -> None:
    both = Both(FAMILIES["flux"], tmp_path)
    tokens = torch.arange(1, 9).view(1, 8)
    model, clip = both.ours(), CLIPTextModel(both.clip.config).eval()
    clip.load_state_dict(both.clip.state_dict())
    network = trained(model, [clip])
    network.save_weights(tmp_path / "ours.safetensors", None, {})
    before = both.clip(tokens).pooler_output
    both.pipeline.load_lora_weights(str(convert(tmp_path / "ours.safetensors", "sd-scripts", "diffusers")))
    with torch.no_grad():
        found, expected = both.clip(tokens).pooler_output, clip(tokens).pooler_output
    assert (found - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_that_peft_trained_answers_with_us_as_with_them(tmp_path: Path, family: str) -> None:
    both = Both(FAMILIES[family], tmp_path)
    layers = ["to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "x_embedder"]
    both.theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    torch.manual_seed(2)
    for name, parameter in both.theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    tensors = {key: value.detach() for key, value in get_peft_model_state_dict(both.theirs).items()}
    both.family.pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=tensors,
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 6, "target_modules": layers},
    )
    ours = convert(tmp_path / "pytorch_lora_weights.safetensors", "diffusers", "sd-scripts")
    torch.testing.assert_close(both.with_lora(ours), both.their_answer(), **CLOSE)
