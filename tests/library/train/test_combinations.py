"""Every recorded combination of settings ends in each script as it should: refused, warned about, implied or done."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from demo_folder import DemoFolder
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK
from library.train.continuity import first_position
from library.train.trainer import Trainer
from tests.clients.flux_training import SmallFluxTrainer, flux_settings
from tests.clients.lllite_training import SmallControlTrainer, lllite_settings
from tests.clients.sdxl_training import SmallSdxlTrainer, sdxl_settings
from tests.clients.training import SmallTrainer, small_settings
from tests.clients.training_db import SmallModelTrainer, db_settings
from tests.library.train.combinations import CASES, DATASETS, HELD_BY, Case

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT.parent / "facts" / "training" / "combinations.json"
ROWS: list[dict[str, str]] = json.loads(FACTS.read_text(encoding="utf-8"))["checks"]

LATER = {"lumina": 16, "hunyuan": 21}
"""Families without a script yet, and how many rows they will have to hold beside those of all trainers."""

WEIGHTS = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae")


@dataclass(frozen=True)
class Script:
    """A training script: how it reads its settings, and what it does with them."""

    read: Callable[[list[str]], Settings]
    trainer: type[Trainer]
    needs: tuple[str, ...] = ()
    """What its command line says beside the model, the data and the output folder."""
    weights: tuple[str, ...] = WEIGHTS[:1]
    pairs: bool = False


SCRIPTS = {
    "sd": Script(
        lambda words: read_settings(TRAIN_NETWORK, "test", argv=words),
        SmallTrainer,
        ("--network_module=networks.lora",),
    ),
    "sdxl": Script(sdxl_settings, SmallSdxlTrainer, ("--network_module=networks.lora",)),
    "flux": Script(flux_settings, SmallFluxTrainer, ("--network_module=networks.lora_flux",), WEIGHTS),
    "lllite": Script(lambda words: lllite_settings(*words), SmallControlTrainer, pairs=True),
    "train_db": Script(lambda words: db_settings(*words), SmallModelTrainer, ("--save_model_as=safetensors",)),
}


def scripts_of(row: Mapping[str, str]) -> list[str]:
    """The scripts that a row is about; those to come are in `LATER`."""
    scope = row["scope"].partition(" (")[0]
    return list(SCRIPTS) if scope == "all trainers" else [name for name in scope.split() if name in SCRIPTS]


def pairs_of(case: Case) -> list[tuple[str, Case]]:
    (row,) = (row for row in ROWS if row["if"] == case.row and scripts_of(row))
    return [(script, case) for script in case.scripts or scripts_of(row)]


PAIRS = [pair for case in CASES for pair in pairs_of(case)]


def test_every_recorded_row_is_held_in_every_script_that_it_is_about() -> None:
    wanted = {(script, row["if"]) for row in ROWS for script in scripts_of(row)}
    held = {(script, case.row) for script, case in PAIRS}
    elsewhere = {(script, row["if"]) for row in ROWS if row["if"] in HELD_BY for script in scripts_of(row)}
    assert wanted == held | elsewhere
    assert len(ROWS) == 51


def test_rows_of_families_to_come_are_counted() -> None:
    words = Counter(word for row in ROWS for word in row["scope"].partition(" (")[0].split())
    assert words.keys() - SCRIPTS.keys() - {"all", "trainers"} == LATER.keys()
    assert {name: words[name] for name in LATER} == LATER
    assert [row["scope"] for row in ROWS if not scripts_of(row)] == ["hunyuan"] * 5


def test_what_is_held_elsewhere_has_a_test() -> None:
    for name in HELD_BY.values():
        *module, test = name.split(".")
        file = ROOT.joinpath(*module).with_suffix(".py")
        assert f"\ndef {test}(" in file.read_text(encoding="utf-8"), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files with one key, one picture with a caption and its pair, and dataset files about them."""
    root = tmp_path_factory.mktemp("combinations")
    for name in ("pictures", "edges", "nothing"):
        (root / name).mkdir()
    for name in ("pictures", "edges"):
        Image.new("RGB", (64, 64), "orange").save(root / name / "a.png")
    (root / "pictures" / "a.txt").write_text("one orange circle, on white", encoding="utf-8")
    for name in WEIGHTS:
        save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, root / f"{name}.safetensors")
    for pairs in (False, True):
        for name, more in DATASETS.items():
            steps = name.rpartition("_")[2] if name.startswith("buckets") else "64"
            pictures, edges = ("nothing", "nothing") if name == "no_images" else ("pictures", "edges")
            lines = [
                *("[[datasets]]", "resolution = 64", "caption_extension = '.txt'", "enable_bucket = true"),
                *("min_bucket_reso = 64", "max_bucket_reso = 128", f"bucket_reso_steps = {steps}"),
                *("[[datasets.subsets]]", f"image_dir = '{(root / pictures).as_posix()}'", more),
            ]
            if pairs or name == "masks":
                lines.append(f"conditioning_data_dir = '{(root / edges).as_posix()}'")
            (root / f"{name}{'_pairs' if pairs else ''}.toml").write_text("\n".join(lines), encoding="utf-8")
    return root


def command_line(script: Script, folder: Path, words: str = "", without: str = "-") -> list[str]:
    """The shortest command line of `script` without a mistake, and `words`; the flag `without` is left out."""
    ending = "_pairs" if script.pairs else ""
    files = {name: (folder / f"{name}{ending}.toml").as_posix() for name in DATASETS}
    given = [word.format(**files, folder=folder.as_posix()) for word in words.split()]
    said = [
        *(f"--{name}={folder / name}.safetensors" for name in script.weights),
        *(f"--dataset_config={files['plain']}", f"--output_dir={folder / 'out'}", "--max_train_steps=2"),
        *script.needs,
        *given,
    ]
    return [word for word in said if not word.startswith(f"--{without}=")]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{script}: {case.words}" for script, case in PAIRS])
def test_a_recorded_combination_ends_as_it_should(
    name: str,
    case: Case,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = SCRIPTS[name]
    packages = {"wandb": None, "deepspeed": importlib.util.find_spec("json")}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: packages[name] if name in packages else find_spec(name)
    )
    words = command_line(script, folder, case.words, case.without)
    if case.end == "refused":
        with pytest.raises(SystemExit) as end:
            script.read(words)
        assert end.value.code == 2
        told = capsys.readouterr().err
    else:
        settings = script.read(words)
        told = "\n".join(settings.warnings)
        if case.end == "silent":
            assert told == "\n".join(script.read(command_line(script, folder)).warnings)
        assert not case.implies or case.implies.items() <= settings.values().items()
    if case.end == "stops":
        with pytest.raises(ValueError) as error:
            read_images(script.trainer(settings))
        told = str(error.value)
    elif case.end == "said":
        caplog.set_level(logging.INFO)
        trainer = script.trainer(settings)
        trainer.show_data() if "--debug_dataset" in case.words else read_images(trainer)
        told = caplog.text
    assert re.search(case.message, told), told


def read_images(trainer: Trainer) -> None:
    """What a run does before it reads a model."""
    trainer.start()
    trainer.load_data()
    assert trainer.data.num_batches == 1
    first_position(trainer.settings, trainer.plan, trainer.past)


def test_weights_are_not_scaled_in_a_network_that_cannot_do_it(small_sd: DemoFolder, tmp_path: Path) -> None:
    words = ("--network_module=tests.clients.plain_network", "--scale_weight_norms=1")
    with pytest.raises(ValueError, match="--scale_weight_norms is not supported by tests.clients.plain_network"):
        SmallTrainer(small_settings(small_sd, tmp_path / "out", *words)).dry_run()
