"""Does everything that the README shows exist and work, and do the pages lead to each other?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from demo_folder import DemoFolder
from library.data.config import read_dataset_config
from library.data.dataset import load_training_set
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.model import ModelFlags
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}")
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


def test_every_page_is_found_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert "docs/README.md" in README
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == pages & set(re.findall(r"\((\w+\.md)", index))


def test_every_script_is_found_from_the_readme() -> None:
    scripts = [path for folder in ("", "tools", "networks") for path in (ROOT / folder).glob("*.py")]
    starts = [path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    names = [path.relative_to(ROOT).as_posix() for path in starts if not path.name.startswith("bench_")]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in README] == []


def test_scripts_are_here_or_planned_as_the_table_says() -> None:
    rows = re.findall(r"^\| (`.*`.*?) \|.*\| (\w+) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    for names, state in rows:
        for name in re.findall(r"`([\w/]+\.py)`", names):
            assert (ROOT / name).exists() == (state == "here"), name


def test_the_training_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "dataset.toml", "prompts.txt"):
        (tmp_path / name).touch()
    command = shown("accelerate launch").replace("/path/to/", "")
    words = shlex.split(command.replace("\\\n", " "))
    settings = read_settings(TRAIN_NETWORK, "", argv=words[words.index("train_network.py") + 1 :])
    assert settings[ModelFlags].pretrained_model_name_or_path == "model.safetensors"


def test_the_dataset_file_is_understood(small_sd: DemoFolder, tmp_path: Path) -> None:
    text = shown("[general]").replace("/path/to/pictures", small_sd.pictures.as_posix())
    (tmp_path / "dataset.toml").write_text(text, encoding="utf-8")
    flags = DatasetFlags(dataset_config=tmp_path / "dataset.toml")
    config = read_dataset_config(flags, CaptionFlags(), bucket_multiple=64)
    data = load_training_set(config)
    assert data.num_batches == 60  # 12 pictures, 10 times each, 2 a batch


def shown(start: str) -> str:
    """The code block of the README that begins with `start`."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if block.strip().startswith(start))


def headings(page: Path) -> set[str]:
    """What a link to a heading of the page says."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
