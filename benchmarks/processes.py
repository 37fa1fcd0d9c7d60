"""Wall time of an epoch on one process and on several, CPU, one thread each.

    python -m benchmarks.processes --processes 2 --pictures 8000

Three branches on the pretrained CIFAR-10 ResNet-20 by recipes/train.py; the last of its epochs is told. The branches of
both runs are compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def run(processes: int, pictures: int, out: Path) -> float:
    """Train; seconds of the last epoch."""
    # `accelerate launch --cpu` starts one process, whatever --num_processes says, unless there is MPI
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    settings = [
        f"data.train=train[:{pictures}]",
        "data.augment=false",
        "train.optimizer=sgd",
        "train.lr=0.03",
        "train.epochs=2",
        "train.checkpoint_dir=null",
        "train.progress=false",
    ]
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *several, "--main_process_port", "0", "--mixed_precision",
         "no", "recipes/train.py", "--config", "recipes/configs/cifar10_resnet20.yaml", "--out", str(out),
         "--threads", "1", *(word for setting in settings for word in ("--set", setting))],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = (out / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=8000)
    options = parser.parse_args()
    table = Table("processes", "seconds an epoch", "of one process", "largest difference of a weight", box=box.MARKDOWN)
    with tempfile.TemporaryDirectory() as folder:
        one, several = Path(folder) / "one", Path(folder) / "several"
        alone, shared = run(1, options.pictures, one), run(options.processes, options.pictures, several)
        a, b = (load_file(out / "adapter" / "ee_adapter.safetensors") for out in (one, several))
    differ = max((a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point())
    table.add_row("1", f"{alone:.1f}", "1", "")
    table.add_row(str(options.processes), f"{shared:.1f}", f"{shared / alone:.2f}", f"{differ:.1e}")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{options.pictures} pictures an epoch, batch 128, seed 0, CPU, 1 thread each, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
