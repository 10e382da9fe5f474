"""--network_args are read strictly."""

from __future__ import annotations

from typing import Any

import pytest

from networks.core.options import NetworkArgs

KNOWN = ("conv_dim", "conv_alpha", "rank_dropout", "verbose", "block_dims")


def args(**values: Any) -> NetworkArgs:
    return NetworkArgs(values, KNOWN, "networks.lora")


def test_values_are_read_as_their_kind() -> None:
    read = args(conv_dim="8", conv_alpha="0.5", verbose="True", block_dims="1, 2,3")
    assert (read.integer("conv_dim"), read.number("conv_alpha"), read.boolean("verbose")) == (8, 0.5, True)
    assert read.integers("block_dims", 3) == [1, 2, 3]
    assert read.numbers("block_dims", 3) == [1.0, 2.0, 3.0]
    assert read.text("conv_dim") == "8"


def test_absent_and_none_are_the_same() -> None:
    read = args(conv_dim=None)
    assert "conv_dim" not in read
    assert (read.integer("conv_dim"), read.number("conv_alpha"), read.boolean("verbose")) == (None, None, None)
    assert (read.integers("block_dims", 3), read.text("conv_dim")) == (None, None)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False), (True, True)])
def test_booleans_have_three_spellings(text: Any, value: bool) -> None:
    assert args(verbose=text).boolean("verbose") is value


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="networks.lora does not know 'con_dim'; did you mean 'conv_dim'"):
        args(con_dim="4")
    with pytest.raises(ValueError, match="known are block_dims, conv_alpha"):
        args(zzz="4")


def test_a_bad_value_is_named() -> None:
    with pytest.raises(ValueError, match="conv_dim: '4.5' is not a whole number"):
        args(conv_dim="4.5").integer("conv_dim")
    with pytest.raises(ValueError, match="conv_dim: 0 is less than 1"):
        args(conv_dim="0").integer("conv_dim")
    with pytest.raises(ValueError, match="conv_alpha: 'x' is not a number"):
        args(conv_alpha="x").number("conv_alpha")
    with pytest.raises(ValueError, match="rank_dropout: 1 must be at least 0 and less than 1"):
        args(rank_dropout="1").number("rank_dropout", below=1.0)
    with pytest.raises(ValueError, match="conv_alpha: nan must be at least 0"):
        args(conv_alpha="nan").number("conv_alpha")
    with pytest.raises(ValueError, match="verbose=yes: expected true or false"):
        args(verbose="yes").boolean("verbose")
    with pytest.raises(ValueError, match="expected 25 numbers"):
        args(block_dims="1,2").integers("block_dims", 25)
