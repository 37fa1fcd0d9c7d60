"""Wall time of an epoch on one process and on several, CPU, one thread each, and how far the weights diverge.

    python -m benchmarks.processes --processes 2 --pictures 8000

Three branches on the pretrained CIFAR-10 ResNet-20, trained by recipes/train.py; the time is of the last epoch. With
`auto` branches, whose ReLUs turn a rounding error into a different gradient where an activation is nearly zero; with
`pool` branches, which have no ReLUs; and on one process with several threads, which also sum in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """One training."""

    branch: str
    processes: int
    threads: int = 1

    def train(self, pictures: int, folder: Path) -> tuple[float, dict[str, Tensor]]:
        """Seconds of the last epoch, and the branches."""
        out = folder / "-".join(map(str, self))
        # `accelerate launch --cpu` starts one process, whatever --num_processes says, unless there is MPI
        several = ["--multi_gpu"] if self.processes > 1 else []
        settings = [
            f"branch={self.branch}",
            f"data.train=train[:{pictures}]",
            "data.augment=false",
            "train.optimizer=sgd",
            "train.lr=0.03",
            "train.epochs=2",
            "train.checkpoint_dir=null",
            "train.progress=false",
        ]
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(self.processes),
             "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
             "recipes/train.py",
             "--config", "recipes/configs/cifar10_resnet20.yaml", "--out", str(out), "--threads", str(self.threads),
             *(word for setting in settings for word in ("--set", setting))],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(self.threads),
                 "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        seconds = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["seconds"]
        return seconds, load_file(out / "adapter" / "ee_adapter.safetensors")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=8000)
    options = parser.parse_args()
    columns = (
        "branches",
        "processes",
        "threads each",
        "seconds per epoch",
        "relative to one process",
        "weights differ by",
    )
    table = Table(*columns, box=box.MARKDOWN)
    several = options.processes
    with tempfile.TemporaryDirectory() as folder:
        for branch in ("auto", "pool"):
            alone, weights = Run(branch, 1).train(options.pictures, Path(folder))
            table.add_row(branch, "1", "1", f"{alone:.1f}", "1", "0")
            for run in [Run(branch, several), Run(branch, 1, several)]:
                seconds, found = run.train(options.pictures, Path(folder))
                differ = max((weights[name].double() - found[name].double()).abs().max().item() for name in weights)
                table.add_row(*map(str, run), f"{seconds:.1f}", f"{seconds / alone:.2f}", f"{differ:.1e}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{options.pictures} images per epoch, 2 epochs, batch 128, seed 0, CPU, torch {torch.__version__}")


if __name__ == "__main__":
    main()
