"""Preview pictures during training: when they are due, how they are made, where they go."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn

from library.flags.monitor import PreviewFlags
from library.flags.output import OutputFlags
from library.generation.images import sample_file_name, sample_index, save_png, to_image
from library.generation.picture_latents import picture_latents
from library.generation.prompt_line import read_prompts, special_options
from library.models.architecture import Architecture, ImageRequest
from library.train.aside import in_eval_mode, unchanged_randomness
from library.train.history import Picture

logger = logging.getLogger(__name__)


class PreviewModels(Protocol):
    """The models of a run, as far as pictures need them."""

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer, with the adapters that are being trained."""
        ...

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """In the order of the family; empty when the prompts were encoded ahead."""
        ...

    @property
    def live_encoders(self) -> Sequence[nn.Module | None]:
        """The same, with None for those that are not in memory."""
        ...

    @property
    def vae(self) -> nn.Module | None:
        """On any device; it lies on the device of the run only while it decodes."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether all processes must run the denoiser equally often."""
        ...


class BeingTrained(Protocol):
    """What is being trained, as far as pictures need it."""

    def modules(self) -> Sequence[nn.Module]:
        """Modules outside of the models that must not be in training mode either."""
        ...

    def start_picture(self, request: ImageRequest) -> None:
        """Called before each picture."""
        ...


class Processes(Protocol):
    """The part of accelerate's Accelerator that previews use."""

    process_index: int
    num_processes: int
    trackers: list[Any]

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run."""
        ...


class Previews:
    """The pictures of `--sample_prompts`, made when `--sample_every_n_epochs`, `_steps` or `--sample_at_first` say so.

    `check` raises ValueError for a picture that what is trained could not make; `options` of prompts are what it reads
    beside those of the family. Raises ValueError when pictures are asked for and the file of prompts is not given,
    missing or malformed.
    """

    def __init__(
        self,
        flags: PreviewFlags,
        output: OutputFlags,
        arch: Architecture,
        check: Callable[[ImageRequest], None] | None = None,
        options: Collection[str] = (),
    ) -> None:
        self.flags = flags
        self.check = check
        self.options = {*arch.picture_options, *options}
        self.arch = arch
        self.output_name = output.output_name
        self.folder = Path(output.output_dir or ".") / "sample"
        self.every_epochs = _positive("--sample_every_n_epochs", flags.sample_every_n_epochs)
        self.every_steps = _positive("--sample_every_n_steps", flags.sample_every_n_steps)
        if self.every_epochs is not None:
            self.every_steps = None
        self.wanted = bool(self.every_epochs or self.every_steps or flags.sample_at_first)
        """Whether any picture will be made, so that the VAE must be kept."""
        self.requests: list[ImageRequest] = []
        self._encoded: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._file_content = b""
        if self.wanted:
            if flags.sample_prompts is None:
                raise ValueError("previews need --sample_prompts, a .txt, .toml or .json file of prompts")
            self._read(Path(flags.sample_prompts))
        elif flags.sample_prompts is not None:
            logger.warning(
                "--sample_prompts has no effect without --sample_every_n_epochs, --sample_every_n_steps or "
                "--sample_at_first"
            )

    def encode_ahead(self, encoders: Sequence[nn.Module], accelerator: Processes) -> None:
        """Encode the prompts now: those of `encoders` that are not trained will be gone when pictures are made."""
        with torch.no_grad(), accelerator.autocast():
            for words in map(_words_of, self.requests):
                text = self.arch.encode_prompts(encoders, words)
                self._encoded[words] = {name: value.to("cpu") for name, value in text.items()}

    def due_at_step(self, step: int) -> bool:
        """Whether pictures are to be made after optimizer step `step`."""
        return self.every_steps is not None and step % self.every_steps == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether pictures are to be made at the end of `epoch`, 1 for the first."""
        return self.every_epochs is not None and epoch % self.every_epochs == 0

    @property
    def due_at_start(self) -> bool:
        """Whether pictures of the untrained model are to be made, as epoch 0."""
        return self.wanted and self.flags.sample_at_first

    def make(
        self,
        models: PreviewModels,
        accelerator: Processes,
        step: int,
        epoch: int | None = None,
        trained: BeingTrained | None = None,
    ) -> list[Path]:
        """Make every picture and return the files of all processes, in the order of the prompts.

        Process i makes the pictures i, i + n, ...; `epoch` None means that the step names them. A picture that
        fails is logged and left out; training continues with the random numbers and modes it had. Processes that
        must keep in step all draw each picture, and the first one writes it.
        """
        if not models.in_step or accelerator.process_index == 0:
            self._read_again()
        mine = list(enumerate(self.requests))[accelerator.process_index :: accelerator.num_processes]
        if models.in_step:
            self.requests = broadcast_object_list([self.requests])[0]
            mine = list(enumerate(self.requests))
        modules = [models.denoiser, *models.text_encoders, *(trained.modules() if trained else ())]
        files: list[tuple[int, Path]] = []
        with torch.no_grad(), unchanged_randomness(accelerator.device), in_eval_mode(modules):
            for index, request in mine:
                path = self._make_one(index, request, models, accelerator, step, epoch, trained)
                if path is not None:
                    files.append((index, path))
        if accelerator.num_processes > 1:
            files = sorted(gather_object(files))
        self._log_images(files, accelerator, step)
        return [path for _, path in files]

    def described(self, files: Sequence[Path]) -> list[Picture]:
        """`files` of `make` with their prompts, in the order of the prompts; paths are relative to --output_dir."""
        pictures = []
        for path in files:
            index = sample_index(path.name)
            prompt = self.requests[index].prompt if index < len(self.requests) else ""
            pictures.append(Picture(path.relative_to(self.folder.parent), prompt, index))
        return pictures

    def _make_one(
        self,
        index: int,
        request: ImageRequest,
        models: PreviewModels,
        accelerator: Processes,
        step: int,
        epoch: int | None,
        trained: BeingTrained | None,
    ) -> Path | None:
        """Make and write one picture; None when that failed, or when another process writes it."""
        if request.seed is None:
            # A seed of its own, not one drawn from the streams of the training; the file name tells it.
            request = replace(request, seed=random.SystemRandom().getrandbits(32))
        draw = partial(self._latents, request, models, accelerator, trained)
        write = partial(self._write, index, request, models.vae, accelerator.device, step, epoch)
        if not models.in_step:
            return _attempted(lambda: write(draw()), request, accelerator.device)
        latents = draw()  # a failure ends the run: the other processes would wait inside the denoiser
        if accelerator.process_index > 0:
            return None
        return _attempted(lambda: write(latents), request, accelerator.device)

    def _write(
        self,
        index: int,
        request: ImageRequest,
        vae: nn.Module | None,
        device: torch.device,
        step: int,
        epoch: int | None,
        latents: Tensor,
    ) -> Path:
        """The file of a picture, [1, C, h, w] as the denoiser left it."""
        _check_finite(latents, "the denoiser's answer")
        assert vae is not None, "the VAE is kept while previews are wanted"
        with _on_device(vae, device):
            pixels = self.arch.decode_latents(vae, latents)[0]
        _check_finite(pixels, "the picture")
        assert request.seed is not None
        name = sample_file_name(self.output_name, step, epoch, index, request.seed, datetime.now())
        save_png(to_image(pixels), self.folder / name)
        logger.info("preview %s: %s", self.folder / name, request.prompt)
        return self.folder / name

    def _latents(
        self, request: ImageRequest, models: PreviewModels, accelerator: Processes, trained: BeingTrained | None
    ) -> Tensor:
        """[1, C, h, w]; encoders that are there may be trained, so they encode the prompts anew each time."""
        if trained is not None:
            trained.start_picture(request)
        words, device = _words_of(request), accelerator.device
        text = dict(self._encoded.get(words, {}))
        with accelerator.autocast():
            if models.text_encoders:
                text |= self.arch.encode_prompts(models.live_encoders, words)
            text = {name: value.to(device) for name, value in text.items()}
            return picture_latents(self.arch, models.denoiser, text, request, device)

    def _read(self, path: Path) -> None:
        """Read the prompts with the family's defaults filled in; ValueError when one of them cannot be made."""
        requests = []
        for number, request in enumerate(read_prompts(path), start=1):
            where = f"{path}, prompt {number} ({request.prompt!r})"
            for key, option in special_options(request).items():
                if key not in self.options:
                    logger.warning("%s: %s has no effect on pictures of this model", where, option)
            if request.sampler is None:
                request = replace(request, sampler=self.flags.sample_sampler)
            try:
                complete = self.arch.complete_request(request)
                if self.check is not None:
                    self.check(complete)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            for side in ("width", "height"):
                asked, made = getattr(request, side), getattr(complete, side)
                if asked is not None and made != asked:
                    logger.warning("%s: %s %d becomes %d", where, side, asked, made)
            if self._encoded and _words_of(complete) not in self._encoded:
                raise ValueError(
                    f"{where}: with --cache_text_encoder_outputs the words of prompts cannot change during a run, "
                    "since the text encoders are gone; all else can"
                )
            requests.append(complete)
        self.requests = requests
        self._file_content = path.read_bytes()

    def _read_again(self) -> None:
        """Take over what was edited since; a file that has become unreadable leaves the prompts as they were."""
        assert self.flags.sample_prompts is not None
        path = Path(self.flags.sample_prompts)
        try:
            if path.read_bytes() != self._file_content:
                self._read(path)
        except (OSError, ValueError) as error:
            logger.warning("the prompts stay as they were: %s", error)

    def _log_images(self, files: Sequence[tuple[int, Path]], accelerator: Processes, step: int) -> None:
        """Send the pictures of all processes to the trackers, from the main process."""
        for tracker in accelerator.trackers if accelerator.process_index == 0 else ():
            for index, path in files:
                try:
                    _log_image(tracker, f"sample_{index}", path, self.requests[index].prompt, step)
                except Exception as error:  # a tracker's trouble must not end the run
                    logger.warning("%s was not sent to %s: %s", path, tracker.name, error)


def _words_of(request: ImageRequest) -> tuple[str, str]:
    """The prompt and the negative prompt, which are encoded together."""
    return request.prompt, request.negative_prompt


def _positive(flag: str, value: int | None) -> int | None:
    if value is not None and value <= 0:
        logger.warning("%s %d is not above 0: it is turned off", flag, value)
        return None
    return value


def _check_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{what} is not finite; with fp16 try bf16, --no_half_vae or a lower learning rate")


def _log_image(tracker: Any, tag: str, path: Path, prompt: str, step: int) -> None:
    if tracker.name == "tensorboard":
        with Image.open(path) as image:
            pixels = np.asarray(image)[None]
        tracker.log_images({tag: pixels}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        tracker.log({tag: wandb.Image(str(path), caption=prompt)}, step=step)


def _attempted(make: Callable[[], Path], request: ImageRequest, device: torch.device) -> Path | None:
    """What `make` gives, or None: nothing about one picture, running out of memory included, ends the run."""
    try:
        return make()
    except Exception as error:
        logger.error(
            "no preview of %r: %s: %s",
            request.prompt,
            type(error).__name__,
            error,
            exc_info=logger.isEnabledFor(logging.DEBUG),
        )
    # Only after the except clause has the exception let go of the tensors of the failed picture.
    if device.type != "cpu":
        gc.collect()
        torch.get_device_module(device).empty_cache()
    return None


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` on `device`, and back where it was."""
    home = next(module.parameters()).device
    try:
        module.to(device)
        yield
    finally:
        module.to(home)
