"""Trains FLUX.1 once for each list of words, every time in two processes that talk through gloo; POSIX only.

The processes are forks, so that the imports are paid once.
"""

import json
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from library.files.weights import save_safetensors  # noqa: E402
from tests.clients.flux_training import SmallFluxTrainer, flux_settings  # noqa: E402


class Ranks(SmallFluxTrainer):
    """Every rank leaves what it holds when the last update is done."""

    def finish(self) -> None:
        """Write this rank's weights beside the result."""
        rank, output = os.environ["RANK"], Path(self.settings.values()["output_dir"])
        save_safetensors(self.trained.network.state_dict_for_saving(), output / f"rank{rank}.safetensors", {})
        super().finish()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    """One pair of processes after the other; 0 if all ended well."""
    failed = 0
    for words in json.loads(sys.stdin.read()):
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = []
        for rank in ("0", "1"):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            children.append(os.fork())
            if children[-1] == 0:
                os._exit(Ranks(flux_settings(words)).run())
        failed += sum(os.waitpid(child, 0)[1] for child in children)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
