"""Trains with two ranks, whole and with divided weights, stopped and continued; forks the ranks, for the imports."""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed.fsdp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from library.files.weights import save_safetensors  # noqa: E402
from library.flags.fsdp_launcher import SWITCH  # noqa: E402
from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from library.models.flux.architecture import Flux  # noqa: E402
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK  # noqa: E402
from library.models.flux.rules import FLUX_RULES  # noqa: E402
from library.models.sd.architecture import StableDiffusion  # noqa: E402
from library.train.network_trainer import NetworkTrainer  # noqa: E402


class Trainer(NetworkTrainer):
    """Trains as ever; with `is_stopped` rank 1 gets SIGINT in the middle of its second step."""

    is_stopped = False

    def start(self) -> None:
        """The end of a run would take the process group away, which the next one needs."""
        super().start()
        self.accelerator.end_training = self.accelerator.wait_for_everyone

    def update(self) -> None:
        """As ever, with the signal before it."""
        if self.is_stopped and self.state.step == 1 and self.accelerator.process_index == 1:
            signal.raise_signal(signal.SIGINT)
        super().update()

    def finish(self) -> None:
        """What this rank holds when its last step is done."""
        rank, folder = self.accelerator.process_index, Path(self.settings.values()["output_dir"])
        held = {parameter.untyped_storage()._cdata: parameter for parameter in map(local, self.denoiser_weights())}
        sizes = {
            "held": sum(parameter.untyped_storage().nbytes() for parameter in held.values()),
            "whole": sum(parameter.nbytes for parameter in self.denoiser_weights()),
        }
        (folder / f"rank{rank}.json").write_text(json.dumps(sizes), encoding="utf-8")
        save_safetensors(self.trained.network.state_dict_for_saving(), folder / f"rank{rank}.safetensors", {})
        super().finish()

    def denoiser_weights(self) -> list[torch.Tensor]:
        """As they lie now, whole ones or parts that know the whole."""
        return list(self.models.denoiser.parameters())


class OnStableDiffusion(Trainer):
    """As train_network.py's."""

    architecture = StableDiffusion


class OnFlux(Trainer):
    """As flux_train_network.py's."""

    architecture = Flux


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What lies in this process of a weight."""
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def run(words: list[str], output: Path, *more: str, is_stopped: bool = False) -> int:
    """The exit code of a run that writes to `output`."""
    argv = [*words, "--output_dir", str(output), *more]
    trainer: Trainer
    if "--ae" in words:
        trainer = OnFlux(read_settings(FLUX_TRAIN_NETWORK, "test", argv=argv, idle=FLUX_IDLE, rules=FLUX_RULES))
    else:
        trainer = OnStableDiffusion(read_settings(TRAIN_NETWORK, "test", argv=argv))
    trainer.is_stopped = is_stopped
    return trainer.run()


def rank_main(folder: Path, words: list[str], flux_words: list[str]) -> int:
    """0 when every run ended as it should."""
    os.environ[SWITCH] = "false"
    codes = [run(words, folder / "whole"), run(flux_words, folder / "flux_whole")]
    os.environ[SWITCH] = "true"
    codes.append(run(flux_words, folder / "flux"))
    codes.append(run(words, folder / "stopped", is_stopped=True) - 130)
    codes.append(run(words, folder / "continued", "--resume", str(folder / "stopped" / "small-step00000003-state")))
    return 0 if not any(codes) else 1


def main() -> int:
    """`root`, which holds the command lines, in the environment of a launcher but for the numbers of its ranks."""
    root = Path(sys.argv[1])
    lines = json.loads((root / "words.json").read_text(encoding="utf-8"))
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os._exit(rank_main(root, *lines))
        ranks.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks)


if __name__ == "__main__":
    sys.exit(main())
