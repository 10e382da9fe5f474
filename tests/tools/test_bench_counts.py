"""A training step does not come to cost more without somebody noticing.

The numbers are those of the small model: 204 LoRA layers of rank 4, text encoder included, one picture of 64 x 64. They
do not depend on the machine. A change that makes one smaller lowers the bound here; one that makes one larger says why.
"""

from __future__ import annotations

import pytest

from demo_folder import DemoFolder
from small_run import small_run

AT_MOST = {
    "kernels_forward": 1110,
    "kernels_backward": 2051,
    "kernels_update": 16,  # three of them bring the norm of the gradient to the host, for the log and the watch
    "elementwise_bytes_forward": 5_961_216,
    "elementwise_bytes_backward": 13_583_288,
    "flops": 271_353_344,
    "bytes_kept_for_backward": 4_135_844,
    "scalar_reads": 0,
}


@pytest.fixture(scope="module")
def counts(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return small_run(small_sd, tmp_path_factory.mktemp("counted")).count()


@pytest.mark.parametrize("what", AT_MOST)
def test_a_step_costs_no_more_than_it_did(counts: dict[str, int], what: str) -> None:
    assert counts[what] <= AT_MOST[what]


def test_the_counts_are_of_a_whole_step(counts: dict[str, int]) -> None:
    # Every one of the 204 layers has at least two products forward and three backward.
    assert counts["kernels_forward"] > 2 * 204
    assert counts["kernels_backward"] > 3 * 204
    assert counts["kernels_update"] > 0
