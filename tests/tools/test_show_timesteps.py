"""Does the tool show the timesteps that a training would draw?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import show_timesteps
from timestep_chart import COLOURS, Curve, draw_chart, round_up

PAGE = (Path(__file__).resolve().parents[2] / "docs/timesteps.md").read_text(encoding="utf-8")
FEW = "--draws=2000"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert show_timesteps.main([FEW, *words]) == 0
    return capsys.readouterr().out.splitlines()


def percents(lines: list[str]) -> list[float]:
    return [float(line[9:].split()[0]) for line in lines if " % " in line + " " and "-" in line[:6]]


def test_the_bins_cover_all_draws(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--timestep_sampling=uniform")
    assert lines[0] == "timestep_sampling=uniform"
    assert len(percents(lines)) == 20 and sum(percents(lines)) == pytest.approx(100, abs=1)
    assert lines[-1].startswith("mean 5") or lines[-1].startswith("mean 49")


def test_only_settings_with_an_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--discrete_flow_shift=2", "--sigmoid_scale=0.5", "--logit_mean=1"]
    assert shown(capsys, "--timestep_sampling=shift", *words)[0] == (
        "timestep_sampling=shift sigmoid_scale=0.5 discrete_flow_shift=2.0"
    )
    assert shown(capsys, "--timestep_sampling=sigmoid", *words)[0] == "timestep_sampling=sigmoid sigmoid_scale=0.5"


def test_flux_shift_follows_the_size_of_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    small = shown(capsys, "--timestep_sampling=flux_shift", "--resolution=256")
    large = shown(capsys, "--timestep_sampling=flux_shift", "--resolution=1024,2048")
    assert small[0].endswith("resolution=256x256") and large[0].endswith("resolution=1024x2048")
    mean = [int(re.match(r"mean (\d+);", lines[-1])[1]) for lines in (small, large)]  # type: ignore[index]
    assert mean[1] > mean[0] + 100


def test_the_share_of_the_loss_is_shown_where_timesteps_are_weighed(capsys: pytest.CaptureFixture[str]) -> None:
    weighed = shown(capsys, "--weighting_scheme=sigma_sqrt")
    assert "weighting_scheme=sigma_sqrt" in weighed[0]
    assert all(line.endswith("% of the loss") for line in weighed[1:21])
    raw = shown(capsys, "--weighting_scheme=sigma_sqrt", "--model_prediction_type=raw")
    assert not any("of the loss" in line for line in raw) and "weighting_scheme" not in raw[0]


def test_settings_are_compared_in_one_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "new" / "timesteps.png"
    lines = shown(
        capsys,
        "--timestep_sampling=shift",
        "--sigmoid_scale=0.7",
        f"--output={picture}",
        "--compare",
        "timestep_sampling=sigmoid",
        "timestep_sampling=flux_shift resolution=512",
    )
    names = [line for line in lines if line.startswith("timestep_sampling")]
    assert names == [
        "timestep_sampling=shift sigmoid_scale=0.7 discrete_flow_shift=3.0",
        "timestep_sampling=sigmoid sigmoid_scale=0.7",
        "timestep_sampling=flux_shift sigmoid_scale=0.7 resolution=512x512",
    ]
    with Image.open(picture) as image:
        colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.convert("RGB").getcolors(1 << 20) or []}
    assert set(COLOURS[:3]) <= colours and COLOURS[3] not in colours


def test_limits_leave_the_bins_outside_empty(capsys: pytest.CaptureFixture[str]) -> None:
    found = percents(shown(capsys, "--timestep_sampling=uniform", "--min_timestep=200", "--max_timestep=600"))
    assert found[:4] == [0, 0, 0, 0] and found[13:] == [0] * 7 and min(found[4:12]) > 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--timestep_sampler=shift"], "did you mean --timestep_sampling?"),
        (["--compare", "sigmoid_scale=wide"], "--sigmoid_scale: invalid float value: 'wide'"),
        (["--min_timestep=700", "--max_timestep=300"], "--min_timestep=700 leaves no timestep"),
        (["--discrete_flow_shift=-1"], "--discrete_flow_shift: must be above 0, got -1.0"),
    ],
)
def test_a_mistake_is_named(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        show_timesteps.main([FEW, *words])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_axis_ends_above_the_highest_share() -> None:
    assert [round_up(share) for share in (0.03, 0.05, 0.13, 0.9)] == [0.04, 0.08, 0.2, 1.0]
    chart = draw_chart([Curve("alone", (0.0,) * 19 + (1.0,), None, 975.0, {})])
    assert chart.width == 960


def test_every_command_of_the_page_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python tools/show_timesteps\.py (.+?)$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|(\S+)', command)]
        assert show_timesteps.main([FEW, *words]) == 0
