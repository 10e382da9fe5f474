"""Networks of LyCORIS train under our trainer, unmodified."""

import pytest
import torch

from library.files.weights import open_weights
from tests.clients.training import train


@pytest.mark.parametrize(
    ("algorithm", "part"), [("lokr", "lokr_w1"), ("loha", "hada_w1_a"), ("locon", "lora_down.weight")]
)
def test_lycoris_trains_four_steps_and_its_file_is_written(small_sd, tmp_path, algorithm, part):
    arguments = ["--network_args", f"algo={algorithm}", "preset=attn-only"]
    trainer = train(
        small_sd, tmp_path, "--network_module", "lycoris.kohya", "--max_train_steps", "4", "--save_every_n_steps", "2",
        *arguments,
    )  # fmt: skip
    assert trainer.state.step == 4
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["small-step00000002.safetensors", "small-step00000004.safetensors", "small.safetensors"]
    with open_weights(tmp_path / files[0]) as early, open_weights(tmp_path / files[2]) as last:
        key = next(key for key in last.keys() if key.startswith("lora_unet_") and key.endswith(part))
        assert not torch.equal(early.read(key), last.read(key)), f"{key} did not move"
        assert last.metadata["ss_network_module"] == "lycoris.kohya"
        assert last.metadata["ss_steps"] == "4"
        text = [key for key in last.keys() if key.startswith("lora_te")]
        assert text and all(key.startswith("lora_te_text_model_encoder_layers_") for key in text)
