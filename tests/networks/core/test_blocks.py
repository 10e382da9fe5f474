"""Block settings read as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from networks.core.blocks import (
    BLOCK_ARGS,
    SD_BLOCKS,
    SDXL_BLOCKS,
    BlockLayout,
    BlockSettings,
    read_block_settings,
    read_lr_weights,
    sd_block_index,
)
from networks.core.key_names import AdapterShape
from networks.core.options import NetworkArgs

RANKS = ",".join(str(i % 5) for i in range(25))


def args(**values: str) -> NetworkArgs:
    return NetworkArgs(values, ("conv_dim", "conv_alpha", *BLOCK_ARGS), "networks.lora")


def settings(conv: AdapterShape | None = None, **values: str) -> BlockSettings:
    return read_block_settings(args(**values), SD_BLOCKS, AdapterShape(4, 2.0), conv)


def test_learning_rate_weights_equal_the_recorded_ones(facts: Path) -> None:
    cases = json.loads((facts / "lora_block_lr_weights.json").read_text(encoding="utf-8"))["cases"]
    compared = 0
    for case in cases:
        layout = SDXL_BLOCKS if case["is_sdxl"] else SD_BLOCKS
        assert read_lr_weights(args(**case["network_args"]), layout) == pytest.approx(case["weights"], abs=1e-12)
        compared += 1
    assert compared == 16


def test_no_weights_without_a_key() -> None:
    assert read_lr_weights(args(), SD_BLOCKS) is None


def test_a_layout_of_another_size_is_only_another_table() -> None:
    weights = read_lr_weights(args(down_lr_weight="linear"), BlockLayout(down=3, mid=2, up=1))
    assert weights == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"down_lr_weight": "0.5"}, "expected 12 numbers separated by commas"),
        ({"up_lr_weight": "sin"}, "sine, cosine"),
        ({"up_lr_weight": "1,a"}, "expected numbers separated by commas"),
        ({"block_lr_zero_threshold": "0.1"}, "needs one of down_lr_weight"),
        ({"block_dims": "1,2,3"}, "expected 25 numbers separated by commas, one for each block, and got 3"),
        ({"block_dims": RANKS.replace("4", "x", 1)}, "'x' is not a whole number"),
        ({"block_alphas": RANKS}, "block_alphas needs block_dims"),
        ({"conv_block_dims": RANKS}, "conv_block_dims needs block_dims, or one of down_lr_weight"),
        ({"block_dims": RANKS, "conv_block_alphas": RANKS}, "conv_block_alphas needs conv_block_dims"),
    ],
)
def test_a_mistake_is_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**values)


def test_ranks_and_alphas_are_filled_in_where_they_are_not_given() -> None:
    assert settings() == BlockSettings()
    by_rank = settings(block_dims=RANKS)
    assert by_rank.linear is not None
    assert by_rank.linear[:3] == [AdapterShape(0, 2.0), AdapterShape(1, 2.0), AdapterShape(2, 2.0)]
    assert by_rank.conv is None
    by_weight = settings(mid_lr_weight="0.5", conv_block_dims=RANKS)
    assert by_weight.linear == [AdapterShape(4, 2.0)] * 25
    assert by_weight.conv is not None
    assert by_weight.conv[3] == AdapterShape(3, 1.0)
    assert settings(AdapterShape(2, 0.5), block_dims=RANKS).conv == [AdapterShape(2, 0.5)] * 25
    alphas = settings(block_dims=RANKS, conv_block_dims=RANKS, conv_alpha="3")
    assert alphas.conv is not None
    assert alphas.conv[4] == AdapterShape(4, 3.0)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.attentions.0.proj_in", 1),
        ("down_blocks.3.resnets.1.conv2", 11),
        ("down_blocks.2.downsamplers.0.conv", 9),
        ("mid_block.resnets.1.conv1", 12),
        ("up_blocks.0.resnets.2.conv_shortcut", 15),
        ("up_blocks.2.upsamplers.0.conv", 21),
        ("up_blocks.3.attentions.2.proj_out", 24),
    ],
)
def test_layers_are_counted_in_blocks(path: str, block: int) -> None:
    assert sd_block_index(path) == block
