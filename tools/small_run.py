"""How is a training run of the small model set up, so that its single steps can be measured?"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.utils import patch_environment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from demo_folder import DemoFolder
from library.data.items import Batch
from library.diffusion.process import Draws
from library.flags.dataset import CacheFlags, DatasetFlags
from library.flags.model import ModelFlags
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import OutputFlags
from library.flags.run import AttentionFlags, StepFlags
from library.flags.settings import Settings
from library.models.sd.architecture import StableDiffusion
from library.train import trainer
from library.train.network_trainer import NetworkTrainer
from library.train.step import step_loss
from step_counts import OperationCounter, count_step, make_fake

DATASET = """\
[[datasets]]
resolution = 64
batch_size = 1
caption_extension = ".txt"
shuffle_caption = true

  [[datasets.subsets]]
  image_dir = "{pictures}"
"""


class SmallRun(NetworkTrainer):
    """A LoRA of rank 4 on all 204 layers of the small model, text encoder included, on latents of 8 x 8."""

    architecture = StableDiffusion

    def start_training(self) -> None:
        """Everything that comes before the first step, on the CPU: counts and CPU times shall not depend on a GPU."""
        with patch_environment(accelerate_use_cpu="true"):
            self.start()
        self.load_data()
        self.load_models()
        self.trained = self.build_trainable()
        self.prepare()

    def batches(self) -> Iterator[Batch]:
        """Batches without end, in the order of training."""
        for epoch in count(1):
            self.state.epoch = epoch
            self.progress.start_epoch(epoch)
            self.trained.start_epoch()
            yield from self.loader.epoch(epoch, first_step=self.state.step)

    def step(self, batch: Batch) -> None:
        """One whole optimizer step, as the trainer does it."""
        loss = self.backward(batch.to(self.device), completes=True)
        self.state.micro_step += 1
        self.progress.add_loss(loss)
        self.update()
        self.after_update()

    def timed_step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """CPU seconds of one whole step, and of that part which is neither forward, backward nor optimizer."""
        inside = 0.0

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*words: Any, **more: Any) -> Any:
                nonlocal inside
                started = time.process_time()
                try:
                    return function(*words, **more)
                finally:
                    inside += time.process_time() - started

            return call

        started = time.process_time()
        with (
            patch.object(trainer, "step_loss", timed(step_loss)),
            patch.object(self.accelerator, "backward", timed(self.accelerator.backward)),
            patch.object(self.updates.optimizer, "step", timed(self.updates.optimizer.step)),
        ):
            self.step(next(batches))
        whole = time.process_time() - started
        return whole, whole - inside

    def count(self) -> dict[str, int]:
        """What one step costs without a clock; the run cannot go on afterwards.

        Forward and backward are counted on fake tensors, the update and the reads of scalars on real ones.
        """
        batches = self.batches()
        self.step(next(batches))
        batch = next(batches)
        with OperationCounter() as whole:
            self.step(batch)
        self.backward(batch, completes=True)
        with OperationCounter() as update:
            self.update()
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # the tables of the noise schedule
        modules = [self.models.denoiser, *self.models.text_encoders, self.trained.network]
        make_fake(modules, mode)
        with mode:
            counts = count_step(lambda: self.loss(batch))
        return counts | {"kernels_update": update.kernels.total(), "scalar_reads": whole.scalar_reads}

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one batch, before anything is differentiated."""
        self.trained.start_step(batch, 0)
        return step_loss(batch, self.arch, self.models, self.trained, Draws.seeded(0))


def small_run(demo: DemoFolder, output: Path) -> SmallRun:
    """A run on the files of `demo` that is ready for its first step; it would write to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    dataset = output / "dataset.toml"
    dataset.write_text(DATASET.format(pictures=demo.pictures.resolve().as_posix()), encoding="utf-8")
    settings = Settings.of(
        ModelFlags(pretrained_model_name_or_path=str(demo.checkpoint), tokenizer_cache_dir=str(demo.tokenizers)),
        DatasetFlags(dataset_config=dataset, max_data_loader_n_workers=0),
        CacheFlags(cache_latents=True),
        NetworkFlags(network_module="networks.lora", network_dim=4, network_alpha=1.0),
        OptimizerFlags(optimizer_type="AdamW", learning_rate=1e-3),
        AttentionFlags(sdpa=True),
        StepFlags(max_train_steps=100_000, seed=1),
        OutputFlags(output_dir=str(output), output_name="measured"),
    )
    run = SmallRun(settings)
    run.start_training()
    return run
