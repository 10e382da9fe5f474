from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.flags.dataset import CacheFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.run import AttentionFlags, LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings, read_settings
from library.models.flux.flags import FLUX_TRAIN_NETWORK
from library.models.flux.rules import FLUX_RULES
from library.train.memory_estimate import Estimate, Need, cures, gradients, optimizer_bytes
from library.train.peak_memory import LiveBytes, step_peak


class Small(nn.Module):
    """Two layers with attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)

    def loss(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))[None]
        return self.last(scaled_dot_product_attention(h, h, h)).square().mean()


def test_a_step_without_content_needs_what_a_real_one_needs() -> None:
    torch.manual_seed(0)
    real = Small()
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as count:
        real.loss(torch.randn(256, 64)).backward()
    with torch.device("meta"):
        model = Small()
    assert step_peak([model], lambda: model.loss(torch.empty(256, 64)), None) == count.peak > 5 * 256 * 64 * 4


def test_what_is_let_go_is_counted_once() -> None:
    with LiveBytes() as count:
        for _ in range(10):
            torch.zeros(1000)
        kept = torch.zeros(500)
        view = kept[:10]
        view.add_(1)
    assert (count.peak, count.live) == (4000, 2000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", 8.0), ("Lion", 4.0), ("SGDNesterov", 4.0), ("Prodigy", 16.0), ("AdamWScheduleFree", 8.0)],
)
def test_the_state_of_an_optimizer_is_measured(name: str, expected: float) -> None:
    flags = OptimizerFlags(optimizer_type=name, learning_rate=1.0)
    assert optimizer_bytes(flags) == pytest.approx(expected, abs=0.01)


def test_the_state_of_8_bit_optimizers_is_a_quarter() -> None:
    assert 2.0 <= optimizer_bytes(OptimizerFlags(optimizer_type="AdamW8bit")) < 2.3


def test_cures_name_what_is_not_done_yet() -> None:
    nothing_done = cures(Settings.of())
    assert [text.split()[0].rstrip(":") for text in nothing_done[:5]] == [
        "--cache_latents",
        "--mixed_precision=bf16",
        "--sdpa",
        "--blocks_to_swap=auto",
        "--gradient_checkpointing",
    ]
    done = cures(
        Settings.of(
            CacheFlags(cache_latents=True),
            PrecisionFlags(mixed_precision="bf16"),
            AttentionFlags(sdpa=True),
            MemoryFlags(gradient_checkpointing=True, cpu_offload_checkpointing=True),
            LargeModelFlags(blocks_to_swap=9, fp8_scaled=True),
        )
    )
    assert [text for text in nothing_done if text not in done] == nothing_done[:5]


def test_cures_for_large_transformers_begin_with_their_weights(flux_words: list[str]) -> None:
    def first(*words: str) -> list[str]:
        settings = read_settings(FLUX_TRAIN_NETWORK, "test", argv=[*flux_words, *words], rules=FLUX_RULES)
        return [text.split()[0].rstrip(":") for text in cures(settings)]

    assert first()[:3] == ["--fp8_scaled", "--blocks_to_swap=auto", "--gradient_checkpointing"]
    assert first("--fp8_scaled", "--blocks_to_swap=18", "--gradient_checkpointing")[0] == "--cpu_offload_checkpointing"
    rest = cures(Settings.of(MemoryFlags(activation_memory="8")))
    assert any(text.startswith("a smaller --activation_memory") for text in rest)


@pytest.fixture
def flux_words(tmp_path: Path) -> list[str]:
    (tmp_path / "file.safetensors").touch()
    files = [f"--{name}={tmp_path / 'file.safetensors'}" for name in ("pretrained_model_name_or_path", "clip_l")]
    files += [f"--{name}={tmp_path / 'file.safetensors'}" for name in ("t5xxl", "ae")]
    where = [f"--train_data_dir={tmp_path}", "--resolution=64", f"--output_dir={tmp_path}"]
    return [
        *files,
        *where,
        "--network_module=networks.lora_flux",
        "--cache_latents",
        "--sdpa",
        "--mixed_precision=bf16",
    ]


def test_the_table_adds_up() -> None:
    estimate = Estimate((Need("denoiser", 1_500_000_000, "weights"), Need("gradients", 250_000_000, "one for each")))
    assert estimate.total == 1_750_000_000
    assert estimate.table().rows[-1][:2] == ("in all", "1.75 GB")


def test_updates_during_backward_hold_one_gradient_at_a_time() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (10, 30, 20)]
    assert gradients(OptimizerFlags(), parameters) == Need("gradients", 240, "one for each")
    assert gradients(OptimizerFlags(fused_backward_pass=True), parameters) == Need("gradients", 120, "one at a time")
