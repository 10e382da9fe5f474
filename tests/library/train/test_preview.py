"""Are previews made when they are due, and without a trace in the training?"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.flags.monitor import PreviewFlags
from library.flags.output import OutputFlags
from library.models.architecture import Condition, ImageRequest
from library.train.preview import Previews


class Toy:
    """What previews ask of a family. Its pictures are one grey: the number of the prompt's letters over 10."""

    picture_options = frozenset({"sample_sampler"})

    def __init__(self) -> None:
        self.seen: list[tuple[ImageRequest, list[bool]]] = []
        self.on_sample: Callable[[ImageRequest], None] = lambda request: None

    def encode_prompts(self, encoders: Sequence[nn.Module], prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"letters": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def condition(self, text: dict[str, Tensor], sizes: Tensor | None = None, lengths: Any = None) -> Condition:
        return Condition(text, sizes)

    def complete_request(self, request: ImageRequest) -> ImageRequest:
        if request.width == 1:
            raise ValueError("--w 1 is too small")
        width = (request.width or 16) // 8 * 8
        return replace(request, width=width, height=request.height or 8, steps=2, scale=7.5)

    def sample(self, denoiser: nn.Module, cond: Condition, uncond: Condition | None, request: ImageRequest) -> Tensor:
        assert uncond is not None and uncond.text["letters"].item() == len(request.negative_prompt)
        assert cond.sizes is not None
        assert cond.sizes.tolist() == [[request.height, request.width, 0, 0, request.height, request.width]]
        self.seen.append((request, [part.training for part in denoiser.modules()]))
        torch.rand(5)
        self.on_sample(request)
        return denoiser(cond.text["letters"].view(1, 1, 1, 1).expand(1, 4, 1, 2) / 10)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


@dataclass
class ToyModels:
    denoiser: nn.Module = field(default_factory=lambda: nn.Sequential(nn.Dropout(1.0), nn.Identity()))
    text_encoders: list[nn.Module] = field(default_factory=lambda: [nn.Dropout()])
    vae: nn.Module | None = field(default_factory=lambda: nn.Linear(1, 1))
    in_step: bool = False

    @property
    def live_encoders(self) -> list[nn.Module]:
        return self.text_encoders


@dataclass
class ToyTrained:
    parts: list[nn.Module]
    started: list[ImageRequest] = field(default_factory=list)

    def modules(self) -> list[nn.Module]:
        return self.parts

    def start_picture(self, request: ImageRequest) -> None:
        self.started.append(request)


class ToyTracker:
    name = "tensorboard"

    def __init__(self) -> None:
        self.logged: list[tuple[str, tuple[int, ...], int]] = []

    def log_images(self, values: dict[str, np.ndarray], step: int, dataformats: str) -> None:
        assert dataformats == "NHWC"
        self.logged += [(tag, pixels.shape, step) for tag, pixels in values.items()]


@dataclass
class ToyProcesses:
    process_index: int = 0
    num_processes: int = 1
    trackers: list[Any] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def prompts_in(folder: Path, *lines: str) -> str:
    file = folder / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def previews_of(folder: Path, arch: Toy, *lines: str, output_name: str | None = "out") -> Previews:
    flags = PreviewFlags(sample_every_n_steps=2, sample_prompts=prompts_in(folder, *lines))
    return Previews(flags, OutputFlags(output_dir=str(folder), output_name=output_name), arch)


def test_a_picture_of_each_prompt_is_written_and_named(tmp_path: Path) -> None:
    arch, tracker = Toy(), ToyTracker()
    previews = previews_of(tmp_path, arch, "abcde --d 42", "a --w 32 --n bad --ss euler")
    files = previews.make(ToyModels(), ToyProcesses(trackers=[tracker]), step=10)
    assert [path.parent for path in files] == [tmp_path / "sample"] * 2
    assert re.fullmatch(r"out_000010_00_\d{14}_42\.png", files[0].name)
    assert re.fullmatch(r"out_000010_01_\d{14}_\d+\.png", files[1].name)
    with Image.open(files[0]) as image:
        assert image.getpixel((0, 0)) == (191, 191, 191)  # 5 letters over 10 is 0.5
    (first, _), (second, _) = arch.seen
    assert (first.sampler, first.seed, first.steps) == ("ddim", 42, 2)
    assert (second.sampler, second.negative_prompt, second.width) == ("euler", "bad", 32)
    assert isinstance(second.seed, int) and f"_{second.seed}.png" in files[1].name
    assert tracker.logged == [("sample_0", (1, 8, 16, 3), 10), ("sample_1", (1, 8, 16, 3), 10)]


def test_a_size_off_the_grid_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    previews_of(tmp_path, Toy(), "a --w 35 --h 8", "b")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'prompts.txt'}, prompt 1 ('a'): width 35 becomes 32"
    ]


def test_an_option_that_the_model_does_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    previews_of(tmp_path, Toy(), "a --ss euler --cn edges.png --g 3.5", "b --l 4")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "--g has no effect on pictures of this model",
        "--cn has no effect on pictures of this model",
    ]
    caplog.clear()
    flags = PreviewFlags(sample_every_n_steps=2, sample_prompts=prompts_in(tmp_path, "a --cn edges.png"))
    Previews(flags, OutputFlags(), Toy(), options={"controlnet_image"})  # what is trained reads it
    assert not caplog.records


def test_an_epoch_names_its_pictures(tmp_path: Path) -> None:
    (path,) = previews_of(tmp_path, Toy(), "a", output_name=None).make(ToyModels(), ToyProcesses(), 10, epoch=2)
    assert path.name.startswith("e000002_00_")


def test_the_training_sees_the_same_random_numbers_with_and_without_previews(tmp_path: Path) -> None:
    previews, models = previews_of(tmp_path, Toy(), "a", "b --d 3"), ToyModels()

    def numbers(make_previews: bool) -> tuple[list[float], float, float]:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if make_previews:
            assert len(previews.make(models, ToyProcesses(), step=2)) == 2
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    assert numbers(True) == numbers(False)


def test_models_sample_in_eval_mode_and_each_part_gets_its_mode_back(tmp_path: Path) -> None:
    arch, models, network = Toy(), ToyModels(), nn.Dropout()
    models.denoiser.train()
    models.denoiser[1].eval()
    before = [part.training for part in models.denoiser.modules()]
    modes: list[bool] = []
    arch.on_sample = lambda request: modes.extend([network.training, models.text_encoders[0].training])
    trained = ToyTrained([network])
    previews_of(tmp_path, arch, "a").make(models, ToyProcesses(), 2, trained=trained)
    assert [request.prompt for request in trained.started] == ["a"]
    assert arch.seen[0][1] == [False, False, False] and modes == [False, False]
    assert [part.training for part in models.denoiser.modules()] == before == [True, True, False]
    assert network.training and models.text_encoders[0].training


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("odd"), ValueError("no")])
def test_a_failing_picture_is_named_and_the_others_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    arch, models = Toy(), ToyModels()
    models.denoiser.train()

    def fail(request: ImageRequest) -> None:
        if request.prompt == "bad one":
            raise error

    arch.on_sample = fail
    state = torch.get_rng_state()
    files = previews_of(tmp_path, arch, "a", "bad one", "c").make(models, ToyProcesses(), 2)
    assert [path.name.split("_")[2] for path in files] == ["00", "02"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == f"no preview of 'bad one': {type(error).__name__}: {error}"
    assert models.denoiser.training and torch.equal(state, torch.get_rng_state())


def test_a_black_picture_of_a_broken_model_is_reported_instead_of_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = ToyModels()
    models.denoiser.forward = lambda x: x * torch.nan
    assert previews_of(tmp_path, Toy(), "a").make(models, ToyProcesses(), 2) == []
    assert "the denoiser's answer is not finite" in caplog.text


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "sample").write_text("a file in its place", encoding="utf-8")
    assert previews_of(tmp_path, Toy(), "a").make(ToyModels(), ToyProcesses(), 2) == []


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = ToyTracker()
    tracker.log_images = lambda *args, **kwargs: 1 / 0
    files = previews_of(tmp_path, Toy(), "a").make(ToyModels(), ToyProcesses(trackers=[tracker]), 2)
    assert len(files) == 1 and "was not sent to tensorboard" in caplog.text


def test_the_vae_lies_on_the_device_only_while_it_decodes(tmp_path: Path) -> None:
    moves: list[str] = []

    class Vae(nn.Linear):
        def to(self, device: torch.device) -> Vae:
            moves.append(str(device))
            return self

    arch = Toy()
    arch.on_sample = lambda request: moves.append("sampled")
    vae = Vae(1, 1)
    previews_of(tmp_path, arch, "a").make(ToyModels(vae=vae), ToyProcesses(device=torch.device("cpu", 0)), 2)
    assert moves == ["sampled", "cpu:0", "cpu"]


def test_processes_share_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.train.preview.gather_object", lambda files: files)
    names = []
    for process in range(2):
        arch = Toy()
        previews_of(tmp_path, arch, "a", "b", "c").make(ToyModels(), ToyProcesses(process, 2), 2)
        names.append([request.prompt for request, _ in arch.seen])
    assert names == [["a", "c"], ["b"]]


def test_processes_in_step_all_draw_and_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_first: list[ImageRequest] = []
    monkeypatch.setattr("library.train.preview.gather_object", lambda files: files)
    monkeypatch.setattr("library.train.preview.broadcast_object_list", lambda requests: [of_first or requests[0]])
    models, drawn, files = ToyModels(in_step=True), [], []
    for process in range(2):
        arch = Toy()
        previews = previews_of(tmp_path, arch, "a", "b" if process == 0 else "edited a moment later")
        files.append(previews.make(models, ToyProcesses(process, 2), 2))
        of_first = of_first or previews.requests
        drawn.append([request.prompt for request, _ in arch.seen])
    assert drawn == [["a", "b"], ["a", "b"]]
    assert [len(written) for written in files] == [2, 0]


def test_a_denoiser_that_fails_in_step_ends_the_run_and_a_file_that_cannot_be_written_does_not(tmp_path: Path) -> None:
    def fail(request: ImageRequest) -> None:
        raise RuntimeError("out of memory")

    arch, models = Toy(), ToyModels(in_step=True)
    previews = previews_of(tmp_path, arch, "a")
    (tmp_path / "sample").touch()
    assert previews.make(models, ToyProcesses(), 2) == []
    arch.on_sample = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        previews.make(models, ToyProcesses(), 2)


def test_prompts_edited_during_the_run_are_taken_over_and_broken_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arch = Toy()
    previews = previews_of(tmp_path, arch, "a")
    prompts_in(tmp_path, "new")
    previews.make(ToyModels(), ToyProcesses(), 2)
    prompts_in(tmp_path, "a --w 1")
    previews.make(ToyModels(), ToyProcesses(), 4)
    (tmp_path / "prompts.txt").unlink()
    previews.make(ToyModels(), ToyProcesses(), 6)
    assert [request.prompt for request, _ in arch.seen] == ["new", "new", "new"]
    assert caplog.text.count("the prompts stay as they were") == 2


def schedule(folder: Path, **flags: Any) -> tuple[list[int], list[int], bool]:
    """Steps and epochs up to 6 at which previews are due, and whether there are any."""
    previews = Previews(PreviewFlags(sample_prompts=prompts_in(folder, "a"), **flags), OutputFlags(), Toy())
    numbers = range(1, 7)
    steps = [n for n in numbers if previews.due_at_step(n)]
    return steps, [n for n in numbers if previews.due_at_epoch(n)], previews.wanted


def test_previews_are_due_by_steps_or_by_epochs_and_epochs_win(tmp_path: Path) -> None:
    assert schedule(tmp_path) == ([], [], False)
    assert schedule(tmp_path, sample_every_n_steps=3) == ([3, 6], [], True)
    assert schedule(tmp_path, sample_every_n_epochs=2) == ([], [2, 4, 6], True)
    assert schedule(tmp_path, sample_every_n_steps=1, sample_every_n_epochs=5) == ([], [5], True)
    assert schedule(tmp_path, sample_at_first=True) == ([], [], True)


def test_zero_turns_a_schedule_off_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert schedule(tmp_path, sample_every_n_epochs=0, sample_every_n_steps=2) == ([2, 4, 6], [], True)
    assert schedule(tmp_path, sample_every_n_steps=-1) == ([], [], False)
    assert "--sample_every_n_epochs 0 is not above 0" in caplog.text
    assert "--sample_every_n_steps -1 is not above 0" in caplog.text
    assert "--sample_prompts has no effect" in caplog.text


def test_only_sample_at_first_makes_pictures_before_the_first_step(tmp_path: Path) -> None:
    flags = PreviewFlags(sample_every_n_steps=2, sample_prompts=prompts_in(tmp_path, "a"))
    output = OutputFlags(output_dir=str(tmp_path))
    assert not Previews(flags, output, Toy()).due_at_start
    previews = Previews(replace(flags, sample_at_first=True), output, Toy())
    assert previews.due_at_start
    (path,) = previews.make(ToyModels(), ToyProcesses(), step=0, epoch=0)
    assert path.name.startswith("e000000_00_")


def test_prompts_that_cannot_be_made_are_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="previews need --sample_prompts"):
        Previews(PreviewFlags(sample_at_first=True), OutputFlags(), Toy())
    with pytest.raises(ValueError, match=r"missing\.txt: there is no such file"):
        missing = str(tmp_path / "missing.txt")
        Previews(PreviewFlags(sample_every_n_epochs=1, sample_prompts=missing), OutputFlags(), Toy())
    with pytest.raises(ValueError, match=r"prompts\.txt, prompt 2 \('b'\): --w 1 is too small"):
        previews_of(tmp_path, Toy(), "a", "b --w 1")


@pytest.mark.gpu
def test_the_random_numbers_of_the_device_are_left_alone_too(tmp_path: Path) -> None:
    arch, models = Toy(), ToyModels()
    arch.on_sample = lambda request: torch.rand(3, device="cuda").sum()
    state = torch.cuda.get_rng_state()
    previews_of(tmp_path, arch, "a").make(models, ToyProcesses(device=torch.device("cuda")), 2)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert next(models.vae.parameters()).device.type == "cpu"
