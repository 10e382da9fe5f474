"""What is measured on a GPU runs here on small models: the same code, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from gpu_run import Found, TimedCopier, endured, lasting_variants, measured, variants
from library.memory.copier import PlainCopier
from made_up_run import FAMILIES, FORMS, Family, MadeUpRun, Variant

CPU = torch.device("cpu")


def rows(family: Family, compiled: bool, forms: Sequence[str] = FORMS) -> dict[Variant, Found]:
    every = variants(family, family.small, "eager")
    chosen = [variant for variant in every if variant.compiled == compiled and variant.form in forms]
    return {variant: measured(MadeUpRun(family, family.small, variant, CPU), 1, warm_up=1) for variant in chosen}


@pytest.mark.parametrize(("name", "count"), [("flux", 15), ("sdxl", 6)])
def test_every_way_to_run_gives_a_row_with_numbers_that_can_be(name: str, count: int) -> None:
    found = rows(FAMILIES[name], compiled=False)
    assert len(found) == count
    learnt: dict[str, set[tuple[float, ...]]] = {}
    for variant, row in found.items():
        assert row.seconds_per_step > 0 and row.host_bytes > 1e8 and row.device_bytes == 0
        assert 0 <= row.waiting < 1
        assert (row.uploaded_bytes > 0) == (variant.blocks_to_swap > 0)
        assert ("uploaded" in str(row)) == (variant.blocks_to_swap > 0)
        assert len(row.losses) == 2 and all(math.isfinite(loss) for loss in row.losses)
        learnt.setdefault(variant.form, set()).add(row.losses)
    assert [len(losses) for losses in learnt.values()] == [1] * len(learnt), "where weights lie changes no bit"
    assert len(set.union(*learnt.values())) == len(learnt), "the formats differ"


@pytest.mark.slow
def test_compiled_blocks_learn_what_others_do() -> None:
    family = FAMILIES["flux"]
    found = rows(family, compiled=True, forms=("bf16",))
    assert len(found) == 4
    for variant, row in found.items():
        plain = Variant(variant.form, variant.blocks_to_swap, variant.recompute)
        expected = measured(MadeUpRun(family, family.small, plain, CPU), 1, warm_up=1)
        assert row.losses == pytest.approx(expected.losses, rel=2e-3)
        assert row.uploaded_bytes == expected.uploaded_bytes


def test_float8_weights_are_half_of_the_uploads() -> None:
    family = FAMILIES["flux"]
    sizes = [
        measured(MadeUpRun(family, family.small, Variant(form, 3), CPU), 1, warm_up=1).uploaded_bytes
        for form in ("bf16", "fp8_base")
    ]
    assert sizes[0] == 2 * sizes[1]


def test_steps_with_swapped_blocks_end_with_the_adapters_of_those_without() -> None:
    family = FAMILIES["flux"]
    names = [
        endured(MadeUpRun(family, family.small, choice, CPU), 3) for choice in lasting_variants(family, family.small)
    ]
    assert len(names) == 3 and len(set(names)) == 1
    other = endured(MadeUpRun(family, family.small, Variant(), CPU), 2)
    assert other != names[0]


def test_there_is_nothing_to_endure_without_swapped_blocks() -> None:
    with pytest.raises(ValueError, match="blocks of SDXL cannot be swapped"):
        lasting_variants(FAMILIES["sdxl"], FAMILIES["sdxl"].full)


def test_the_table_of_flux_at_full_size_has_every_way_that_was_asked_for() -> None:
    family = FAMILIES["flux"]
    found = [str(variant) for variant in variants(family, family.full, "inductor")]
    assert len(found) == len(set(found)) == 3 * 5 * 2 * 2 + 3
    assert found[0] == "bf16, all recomputed"
    assert "fp8_scaled, 18 blocks swapped, products kept, compiled" in found


def test_waiting_is_the_time_between_the_marks() -> None:
    class SlowCopier(PlainCopier):
        def wait(self, moment: object) -> None:
            torch.randn(2000, 200).square().sum()

    copier = TimedCopier(SlowCopier(), is_gpu=False)
    copier.wait(copier.mark())
    assert copier.seconds() > 0
    assert copier.seconds() == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_500_steps_on_a_gpu_with_swapped_blocks_end_with_the_adapters_of_those_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    family, device = FAMILIES["flux"], torch.device("cuda", 0)
    torch.use_deterministic_algorithms(True)
    try:
        names = [
            endured(MadeUpRun(family, family.small, choice, device), 500)
            for choice in lasting_variants(family, family.small)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(names)) == 1
