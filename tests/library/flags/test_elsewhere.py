from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.flags.declare import declared_flags
from library.flags.dreambooth import TRAIN_DB
from library.flags.elsewhere import SCRIPTS_WITH
from library.flags.lllite import TRAIN_LLLITE
from library.flags.settings import Settings
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FLUX_TRAIN_NETWORK
from library.models.sdxl.flags import SDXL_TRAIN_NETWORK

SCRIPTS = {
    "train_network.py": TRAIN_NETWORK,
    "sdxl_train_network.py": SDXL_TRAIN_NETWORK,
    "flux_train_network.py": FLUX_TRAIN_NETWORK,
    "sdxl_train_control_net_lllite.py": TRAIN_LLLITE,
    "train_db.py": TRAIN_DB,
}


def test_every_flag_that_some_scripts_have_and_others_do_not_is_known_with_its_scripts() -> None:
    names = {script: declared_flags(groups).keys() for script, groups in SCRIPTS.items()}
    everywhere = set.intersection(*map(set, names.values()))
    somewhere = set.union(*map(set, names.values())) - everywhere
    assert {name: {s for s in SCRIPTS if name in names[s]} for name in somewhere} == {
        name: set(scripts) for name, scripts in SCRIPTS_WITH.items()
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text_encoder_lr1=1e-5", "--text_encoder_lr1 is not a flag of this script but of sdxl_train_network.py;"),
        (
            "--cache_text_encoder_outputs",
            "of sdxl_train_network.py, flux_train_network.py and sdxl_train_control_net_lllite.py; leave it out here",
        ),
    ],
)
def test_a_flag_of_another_script_is_refused_with_the_name_of_that_script(
    refused: Callable[..., list[str]], base: list[str], words: str, message: str
) -> None:
    assert message in "\n".join(refused(*base, words))


def test_what_is_off_in_a_file_may_be_a_flag_of_another_script(
    read: Callable[..., Settings], refused: Callable[..., list[str]], base: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("cache_text_encoder_outputs = false\nae = ''\nseed = 3\n", encoding="utf-8")
    assert read(f"--config_file={file}").values()["seed"] == 3
    file.write_text("cache_text_encoder_outputs = true\n", encoding="utf-8")
    assert (
        "cache_text_encoder_outputs is not a flag of this script but of" in refused(*base, f"--config_file={file}")[0]
    )
