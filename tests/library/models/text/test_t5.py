from __future__ import annotations

import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from library.files.weights import open_weights, save_safetensors
from library.models.text.t5 import (
    T5_KIND,
    T5Encoder,
    build_t5,
    check_t5_vocabulary,
    t5_sources,
    tokenize_padded,
)
from library.models.text.tokens import load_tokenizer
from tests.library.models.sd.manifests import ManifestFile, manifest

FACTS = Path(__file__).resolve().parents[3] / "facts"


def theirs() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=30,
        d_model=32,
        d_kv=8,
        d_ff=24,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config).eval()


def weights(model: T5EncoderModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def load(path: Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    with open_weights(path) as file:
        return build_t5(t5_sources(file), dtype, "cpu")


def test_it_answers_as_transformers_does(tmp_path: Path) -> None:
    model, path = theirs(), tmp_path / "t5.safetensors"
    save_safetensors(weights(model), path)
    ours = load(path)
    ids = torch.randint(0, 30, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 4:] = 0
    torch.testing.assert_close(ours(ids), model(ids).last_hidden_state)
    torch.testing.assert_close(ours(ids, mask), model(ids, mask).last_hidden_state)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_what_is_masked_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    save_safetensors(weights(theirs()), path)
    ours, ids = load(path), torch.randint(0, 30, (1, 9))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]])
    changed = ids.clone()
    changed[:, 4:] = 5
    assert torch.equal(ours(ids, mask)[:, :4], ours(changed, mask)[:, :4])
    torch.testing.assert_close(ours(ids, mask)[:, :4], ours(ids[:, :4]))


@pytest.mark.parametrize("left_out", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_table_of_tokens_is_read_under_either_name(tmp_path: Path, left_out: str) -> None:
    model, path = theirs(), tmp_path / "t5.safetensors"
    save_safetensors({key: value for key, value in weights(model).items() if key != left_out}, path)
    assert torch.equal(load(path).shared.weight, model.shared.weight)


def test_a_decoder_in_the_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    save_safetensors(weights(theirs()) | more, path)
    assert load(path).config.num_layers == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_every_number_format_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = theirs(), tmp_path / "t5.safetensors"
    save_safetensors({name: value.to(dtype) for name, value in weights(model).items()}, path)
    ours = load(path, torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours(torch.randint(0, 30, (1, 5))).isfinite().all()


def test_the_published_file_loads_on_the_meta_device() -> None:
    file = ManifestFile(Path("t5xxl_fp16.safetensors"), manifest(FACTS, "t5xxl"))
    encoder = build_t5(t5_sources(file), torch.float16, "meta")
    config = encoder.config
    assert (config.num_layers, config.num_heads, config.d_kv, config.d_model, config.d_ff) == (24, 64, 64, 4096, 10240)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 4_762_310_656


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.block.0.layer.0.SelfAttention.q.weight"), "no T5 text encoder is in it"),
        (lambda w: w.pop("encoder.block.2.layer.1.layer_norm.weight"), "1 weights are missing: encoder.block.2"),
        (
            lambda w: w.update(surplus=torch.zeros(1)) or w.update({"encoder.x": torch.zeros(1)}),
            "do not belong.*encoder.x",
        ),
        (lambda w: [w.pop(k) for k in ("shared.weight", "encoder.embed_tokens.weight")], "shared.weight is missing"),
        (
            lambda w: [w.pop(k) for k in list(w) if "wi_" in k],
            "a T5 of version 1.1 is needed",
        ),
    ],
)
def test_files_that_are_not_whole_are_named(tmp_path: Path, change, message: str) -> None:
    path, found = tmp_path / "t5.safetensors", weights(theirs())
    change(found)
    save_safetensors(found, path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert re.search("t5.safetensors", str(error.value))


def test_a_tokenizer_of_sentencepiece_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "google_t5-v1_1-xxl"
    folder.mkdir()
    lines = tmp_path / "lines.txt"
    lines.write_text("a red house on the hill\nthe cat of stone\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=20,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    tokenizer = load_tokenizer("google/t5-v1_1-xxl", "", str(tmp_path), kind=T5_KIND)
    ids, mask = tokenize_padded(tokenizer, ["a red house", ""], 24)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a red house"
    assert ids[1].tolist() == [1] + [0] * 23 and mask[1].sum() == 1


def test_a_folder_without_a_t5_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "google_t5-v1_1-xxl"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds no tokenizer: spiece\.model, or tokenizer\.json"):
        load_tokenizer("google/t5-v1_1-xxl", "", str(tmp_path), kind=T5_KIND)
    (folder / "spiece.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no T5 tokenizer that can be read"):
        load_tokenizer("google/t5-v1_1-xxl", "", str(tmp_path), kind=T5_KIND)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    save_safetensors(weights(theirs()), path)
    with pytest.raises(ValueError, match="ids up to 30, but t5 knows 30 tokens"):
        check_t5_vocabulary(load(path), range(31), "t5")
