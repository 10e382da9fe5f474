"""Options and fixtures that every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from demo_flux_folder import FluxDemo, write_flux_demo
from demo_folder import DemoFolder, write_demo
from demo_sdxl_folder import SdxlDemo, write_sdxl_demo
from tests.clients.fork_server import ForkServer

os.environ.setdefault("MKL_CBWR", "AUTO")  # before the first matrix product, as a run does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-cases", metavar="DIR", help="a folder of recorded cases, in place of tests/parity/cases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def small_sd(tmp_path_factory: pytest.TempPathFactory) -> DemoFolder:
    """A small SD 1.x checkpoint with tokenizer, captioned pictures, dataset TOML and prompts; do not write into it."""
    return write_demo(tmp_path_factory.mktemp("small_sd"))


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory: pytest.TempPathFactory) -> SdxlDemo:
    """A small SDXL checkpoint with tokenizers, captioned pictures, dataset TOML and prompts; do not write into it."""
    return write_sdxl_demo(tmp_path_factory.mktemp("small_sdxl"))


@pytest.fixture(scope="session")
def small_flux(tmp_path_factory: pytest.TempPathFactory) -> FluxDemo:
    """Small FLUX.1 and Chroma models with their parts, tokenizers, pictures and prompts; do not write into it."""
    return write_flux_demo(tmp_path_factory.mktemp("small_flux"))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """What starts runs that need a process of their own."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def facts() -> Path:
    """The folder of recorded facts: names, shapes and numbers of published files and programs."""
    return Path(__file__).resolve().parent / "facts"


@pytest.fixture(scope="module", autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the state of the first Accelerator of a process; no test file sees that of another."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
