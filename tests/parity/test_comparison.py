"""Does the comparison of recorded and computed outputs find what it should?"""

from __future__ import annotations

import torch

from tests.parity.test_parity import adapter_of, compare, slice_of


def test_values_within_tolerance_are_equal() -> None:
    recorded = {"out": torch.tensor([1.0, 2.0, torch.inf])}
    assert compare({"out": torch.tensor([1.0, 2.0002, torch.inf])}, recorded, atol=1e-4, rtol=1e-4) == []


def test_the_worst_output_comes_first_with_its_place() -> None:
    recorded = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    ours = {"a": torch.full((2, 3), 0.2), "b": torch.zeros(2, 3)}
    ours["b"][1, 2] = 0.5
    worst, second = compare(ours, recorded, atol=0.1, rtol=0.0)
    assert worst == "b: 1 of 6 values wrong, the worst at [1, 2] 5 times the tolerance: 0.5 instead of 0"
    assert second.startswith("a: 6 of 6 values wrong")


def test_missing_unknown_and_misshapen_outputs_and_nan_are_faults() -> None:
    recorded = {"a": torch.zeros(2), "b": torch.zeros(2), "d": torch.zeros(1)}
    ours = {"b": torch.zeros(3), "c": torch.zeros(2), "d": torch.tensor([torch.nan])}
    faults = compare(ours, recorded, atol=1.0, rtol=0.0)
    assert {fault.split(":")[0] for fault in faults} == {"a", "b", "c", "d"}


def test_slices_are_read_as_written() -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(values[slice_of("[:, ::2]")], values[:, ::2])
    assert torch.equal(values[slice_of("[1:, :, -2:]")], values[1:, :, -2:])


def test_adapters_are_found_by_the_name_of_the_case() -> None:
    assert adapter_of("sd21_unet") == "unet"
    assert adapter_of("no_such_case") is None
