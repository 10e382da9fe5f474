"""Text encoders answer as transformers does, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from library.files.weights import open_weights, save_safetensors
from library.models.text.clip import (
    TextEncoder,
    build_text_encoder,
    check_vocabulary,
    clip_sources,
    encode_caption,
    encode_prompt,
    openclip_sources,
)
from library.models.text.tokens import TokenRows
from tests.library.models.text.toy_tokenizer import ToyTokenizer


def published_encoder(activation: str = "quick_gelu", attention: str = "sdpa") -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=48,
        eos_token_id=49,
        attn_implementation=attention,
    )
    return CLIPTextModel(config).eval()


def read(tensors: dict[str, Tensor], path: Path, prefix: str = "", activation: str = "quick_gelu") -> TextEncoder:
    save_safetensors(tensors, path)
    with open_weights(path) as file:
        return build_text_encoder(clip_sources(file, prefix), activation, torch.float32, "cpu")


IDS = torch.arange(2 * 77).reshape(2, 77) % 47


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_states_equal_those_of_transformers_at_every_clip_skip(tmp_path: Path, attention: str, activation: str) -> None:
    theirs = published_encoder(activation, attention)
    ours = read(theirs.state_dict(), tmp_path / "a.safetensors", activation=activation)
    with torch.no_grad():
        hidden = theirs(IDS, output_hidden_states=True).hidden_states
        for skip in (1, 2, 3):
            expected = theirs.final_layer_norm(hidden[-skip])
            torch.testing.assert_close(ours(IDS, skip), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(ours(IDS), theirs(IDS).last_hidden_state, atol=2e-6, rtol=1e-5)


def test_both_attention_implementations_give_the_same_numbers(tmp_path: Path) -> None:
    ours = read(published_encoder().state_dict(), tmp_path / "a.safetensors")
    with torch.no_grad():
        with_sdpa = ours(IDS)
        ours.config._attn_implementation = "eager"
        torch.testing.assert_close(ours(IDS), with_sdpa, atol=2e-6, rtol=1e-5)


def test_text_model_in_the_names_and_position_ids_make_no_difference(tmp_path: Path) -> None:
    weights = published_encoder().state_dict()
    plain = read({f"x.{key}": value for key, value in weights.items()}, tmp_path / "a.safetensors", "x.")
    older = {f"x.text_model.{key}": value for key, value in weights.items()}
    older["x.text_model.embeddings.position_ids"] = torch.arange(77.0)[None] + 0.4
    other = read(older, tmp_path / "b.safetensors", "x.")
    assert plain.embeddings.position_ids.tolist() == [list(range(77))]
    assert plain.embeddings.position_ids.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(plain(IDS), other(IDS))


def test_the_openclip_layout_is_split_and_its_last_layer_left_out(tmp_path: Path) -> None:
    theirs = published_encoder("gelu")
    weights = theirs.state_dict()
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    tensors = {
        "m.token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "m.positional_embedding": weights["embeddings.position_embedding.weight"],
        "m.ln_final.weight": weights["final_layer_norm.weight"],
        "m.ln_final.bias": weights["final_layer_norm.bias"],
        "m.text_projection": torch.zeros(128, 128),
        "m.logit_scale": torch.zeros(()),
    }
    for layer in range(3):
        ours, block = f"encoder.layers.{layer}.", f"m.transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
            for name, published in names.items():
                tensors[f"{block}{published}.{kind}"] = weights[f"{ours}{name}.{kind}"]
    path = tmp_path / "a.safetensors"
    save_safetensors(tensors, path)
    with open_weights(path) as file, torch.no_grad():
        whole = build_text_encoder(openclip_sources(file, "m.", 3), "gelu", torch.float32, "cpu")
        torch.testing.assert_close(whole(IDS), theirs(IDS).last_hidden_state, atol=2e-6, rtol=1e-5)
        shorter = build_text_encoder(openclip_sources(file, "m.", 2), "gelu", torch.float32, "cpu")
        torch.testing.assert_close(shorter(IDS), whole(IDS, 2), atol=2e-6, rtol=1e-5)


def test_a_caption_of_several_rows_keeps_only_the_outer_marks(tmp_path: Path) -> None:
    encoder = read(published_encoder().state_dict(), tmp_path / "a.safetensors")
    rows = IDS[None]  # one caption of two rows
    with torch.no_grad():
        states = encode_caption(encoder, rows, None)
        single = encoder(IDS)
    assert states.shape == (1, 152, 128)
    assert torch.equal(states[0, :76], single[0, :76])
    assert torch.equal(states[0, 76:], single[1, 1:])


def test_weights_multiply_captions_and_restore_the_mean_of_prompts(tmp_path: Path) -> None:
    encoder = read(published_encoder().state_dict(), tmp_path / "a.safetensors")
    weights = torch.ones(1, 2, 77)
    weights[0, 0, 3] = 1.5
    weights[0, 1, 5] = 0.5
    with torch.no_grad():
        encoder.final_layer_norm.bias += 0.3  # else all means are 0
        plain = encode_caption(encoder, IDS[None], None)
        caption = encode_caption(encoder, IDS[None], weights)
        prompt = encode_prompt(encoder, TokenRows(IDS[None], weights))
        unweighted = encode_prompt(encoder, TokenRows(IDS[None], torch.ones(1, 2, 77)))
    assert torch.equal(caption[0, 3], plain[0, 3] * 1.5)
    assert torch.equal(caption[0, 80], plain[0, 80] * 0.5)
    assert torch.equal(caption[0, 10], plain[0, 10])
    assert prompt.shape == (1, 154, 128)
    assert float(prompt.mean()) == pytest.approx(float(unweighted.mean()), rel=1e-4)
    assert not torch.allclose(prompt, unweighted)
    ratio = prompt[0, 3] / unweighted[0, 3] / (prompt[0, 10] / unweighted[0, 10])
    assert float(ratio.median()) == pytest.approx(1.5, rel=1e-4)


def test_a_file_without_a_text_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors: no CLIP text encoder is in it"):
        read({"unrelated": torch.zeros(1)}, tmp_path / "a.safetensors")


def test_a_tokenizer_with_ids_that_the_encoder_lacks_is_refused(tmp_path: Path) -> None:
    encoder = read(published_encoder().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="ids up to 901, but the text encoder of model.ckpt knows 50 tokens"):
        check_vocabulary(encoder, ToyTokenizer(pad_token_id=0), "model.ckpt")
