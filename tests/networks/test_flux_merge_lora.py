"""A model with LoRAs merged in is the model plus their effects, and a merged LoRA their sum."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from networks import flux_merge_lora
from networks.core import model_merge
from tests.networks.lora_files import CLIP, LAYERS, T5, effects, lora, model, save

ONE, TWO = lora(rank=2, alpha=1.0), lora({"img_in": LAYERS["img_in"]}, rank=3, alpha=6.0)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "flux": str(save(tmp_path, "flux", model(), {"format": "pt", "modelspec.title": "base"})),
        "one": str(save(tmp_path, "one", ONE)),
        "two": str(save(tmp_path, "two", TWO)),
        "out": str(tmp_path / "out.safetensors"),
    }


def merge(*words: str) -> None:
    assert flux_merge_lora.main(list(words)) == 0


def refused(caplog: pytest.LogCaptureFixture, *words: str) -> str:
    caplog.clear()
    assert flux_merge_lora.main(list(words)) == 1
    return caplog.messages[-1]


def metadata_of(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_model_gets_every_effect_times_its_ratio(tmp_path: Path, files: dict[str, str], prefix: str) -> None:
    base = model(prefix=prefix)
    flux = str(save(tmp_path, "base", base))
    words = ["--models", files["one"], files["two"], "--ratios", "0.8", "-0.5", "--save_to", files["out"]]
    merge("--flux_model", flux, *words)
    merged = load_file(files["out"])
    for key, weight in base.items():
        name = "lora_unet_" + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
        expected = weight + 0.8 * effects(ONE).get(name, 0) - 0.5 * effects(TWO).get(name, 0)
        assert torch.allclose(merged[key], expected, atol=1e-5), key
    assert metadata_of(files["out"])["modelspec.merged_from"] == "base, one, two"


def test_text_encoders_are_merged_too(tmp_path: Path, files: dict[str, str]) -> None:
    both = lora(CLIP, "lora_te1") | lora(T5, "lora_te3")
    lora_file = str(save(tmp_path, "text", both))
    outs = [str(tmp_path / f"{name}_out.safetensors") for name in ("clip", "t5")]
    clip, t5 = str(save(tmp_path, "clip", model(CLIP))), str(save(tmp_path, "t5", model(T5)))
    merge(
        "--clip_l", clip, "--clip_l_save_to", outs[0], "--t5xxl", t5, "--t5xxl_save_to", outs[1], "--models", lora_file
    )
    for out, layers, prefix in ((outs[0], CLIP, "lora_te1"), (outs[1], T5, "lora_te3")):
        merged = load_file(out)
        for path in layers:
            expected = model(layers)[f"{path}.weight"] + effects(both)[f"{prefix}_{path.replace('.', '_')}"]
            assert torch.allclose(merged[f"{path}.weight"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "saved", "dtype"),
    [("float", None, "float32"), ("bf16", None, "bfloat16"), ("float", "fp8_e4m3fn", "float8_e4m3fn")],
)
def test_every_tensor_gets_the_format_that_was_asked_for(
    files: dict[str, str], precision: str, saved: str | None, dtype: str
) -> None:
    words = ["--save_precision", saved] if saved else []
    merge("--flux_model", files["flux"], "--models", files["one"], "--save_to", files["out"], "--precision", precision,
          "--no_metadata", *words)  # fmt: skip
    assert {str(value.dtype) for value in load_file(files["out"]).values()} == {f"torch.{dtype}"}
    assert metadata_of(files["out"]) == {}


def test_one_weight_is_in_memory_at_a_time(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    plain = model_merge.stream_safetensors

    def watched(shapes: dict[str, Tensor], value: object, *rest: object) -> None:
        def counted(key: str) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            tensor = value(key)  # type: ignore[operator]
            alive -= 1
            return tensor

        assert all(shape.is_meta for shape in shapes.values())
        plain(shapes, counted, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model_merge, "stream_safetensors", watched)
    merge("--flux_model", files["flux"], "--models", files["one"], "--save_to", files["out"])
    assert most == 1


def test_ranks_beside_each_other_add_up_exactly(files: dict[str, str]) -> None:
    merge("--models", files["one"], files["two"], "--ratios", "0.7", "0.2", "--concat", "--shuffle", "--save_to",
          files["out"])  # fmt: skip
    combined = effects(load_file(files["out"]))
    for name, effect in effects(ONE).items():
        assert torch.allclose(combined[name], 0.7 * effect + 0.2 * effects(TWO).get(name, 0), atol=1e-5)
    metadata = metadata_of(files["out"])
    assert (metadata["ss_network_dim"], metadata["ss_network_module"]) == ("Dynamic", "networks.lora_flux")


def test_a_lora_of_diffusers_is_merged_as_it_is(tmp_path: Path, files: dict[str, str]) -> None:
    path = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)}
    theirs = str(save(tmp_path, "theirs", tensors))
    merge("--flux_model", files["flux"], "--models", theirs, "--save_to", files["out"])
    key = "double_blocks.0.img_attn.qkv.weight"
    change = load_file(files["out"])[key] - model()[key]
    assert torch.allclose(change[8:16], torch.full((8, 8), 2.0), atol=1e-5) and change[:8].abs().max() == 0


def test_adapters_whose_model_is_not_given_are_named(
    tmp_path: Path, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    both = str(save(tmp_path, "both", ONE | lora(CLIP, "lora_te1")))
    with caplog.at_level(logging.WARNING):
        merge("--flux_model", files["flux"], "--models", both, "--save_to", files["out"], "--concat")
    assert "2 adapters have no layer in these models, such as lora_te1_" in caplog.text
    assert "--concat has no effect where LoRAs are merged into a model" in caplog.text


def test_a_lora_of_chroma_in_flux_is_named(
    tmp_path: Path, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    chroma = str(save(tmp_path, "chroma", ONE, {"ss_base_model_version": "chroma"}))
    with caplog.at_level(logging.WARNING):
        merge("--flux_model", files["flux"], "--models", chroma, "--save_to", files["out"])
    assert "chroma.safetensors says that it was trained on chroma" in caplog.text


def test_nonsense_is_refused_by_name(tmp_path: Path, files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    one, flux, out = ["--models", files["one"]], ["--flux_model", files["flux"]], ["--save_to", files["out"]]

    def of(name: str, tensors: dict[str, Tensor]) -> str:
        return str(save(tmp_path, name, tensors))

    sdxl = of("sdxl", lora({"input_blocks.4.1.proj_in": (8, 8)}))
    assert "it is a LoRA for SDXL" in refused(caplog, *flux, "--models", sdxl, *out)
    other = of("other", lora({"img_in": (9, 4)}))
    message = refused(caplog, *flux, "--models", other, *out)
    assert "is for a layer of 9 x 4" in message and "is 8 x 4: the LoRA was made for another model" in message
    deeper = of("deeper", ONE | lora({"double_blocks.7.img_attn.proj": (8, 8)}))
    message = refused(caplog, *flux, "--models", deeper, *out)
    assert "lora_unet_double_blocks_7_img_attn_proj: the LoRA is for another model" in message
    assert "--ratios has 2 values for 1" in refused(caplog, *flux, *one, "--ratios", "1", "2", *out)
    assert "--models is missing" in refused(caplog, *flux, *out)
    assert "--save_to is missing" in refused(caplog, *flux, *one)
    assert "ends in .safetensors" in refused(caplog, *flux, *one, "--save_to", str(tmp_path / "out.ckpt"))
    assert "--clip_l is missing" in refused(caplog, *flux, *one, *out, "--clip_l_save_to", files["out"])
    assert "is a LoRA; the file of a model" in refused(caplog, "--flux_model", files["one"], *one, *out)
    assert "--precision fp9: expected one of" in refused(caplog, *flux, *one, *out, "--precision", "fp9")
    assert "--working_device tpu7:" in refused(caplog, *flux, *one, *out, "--working_device", "tpu7")
    assert "is the model that is read" in refused(caplog, *flux, *one, "--save_to", files["flux"])
    assert "no key names of diffusers" in refused(caplog, *flux, *one, *out, "--diffusers")
    scaled = of("scaled", model() | {"img_in.scale_weight": torch.ones(())})
    assert "fp8 weights are scaled" in refused(caplog, "--flux_model", scaled, *one, *out)
    unet = of("sd", {"down_blocks.0.attentions.0.proj_in.weight": torch.ones(2, 2)})
    assert "no FLUX.1 and no Chroma" in refused(caplog, "--flux_model", unet, *one, *out)
    assert "only LoRAs of one rank can be added" in refused(caplog, "--models", files["one"], files["two"], *out)
    assert not Path(files["out"]).exists()
    assert torch.equal(load_file(files["flux"])["img_in.weight"], model()["img_in.weight"])
