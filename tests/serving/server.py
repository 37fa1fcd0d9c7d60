"""A served adapter in a process of its own, for tests: real HTTP over loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import timm
import torch

import ee_surgery as ee
from tests import ROOT

SIDE = 64


def adapter(folder: Path) -> tuple[list[str], ee.EarlyExitModel, torch.Tensor]:
    """A trained and calibrated adapter of a tiny timm network, in files.

    Returns:
        Arguments of `ee-surgery serve`, the model itself, and samples like those it was calibrated on.
    """
    torch.manual_seed(0)
    base = timm.create_model("test_resnet").eval()
    with torch.no_grad():
        base.get_classifier().weight.mul_(30)  # random weights that tell some classes apart
    torch.save(base.state_dict(), folder / "weights.pt")
    x = 3 * torch.rand(240, 1, 1, 1) * torch.randn(240, 3, SIDE, SIDE) + torch.randn(240, 3, 1, 1)
    branched = ee.augment(base, 2, sample=x[:4])
    branched.preprocessing = {**(branched.preprocessing or {}), "input_size": [3, SIDE, SIDE]}
    ee.train(branched, [*x[:160].split(20)], ee.TrainConfig(epochs=4, teach="original", lr=0.03))
    ee.calibrate(branched, [x[160:]])
    branched.operate(max_accuracy_drop=0.1)
    branched.save_pretrained(folder / "adapter")
    return [str(folder / "adapter"), "--checkpoint", str(folder / "weights.pt")], branched, x


class Served(NamedTuple):
    """A running server."""

    client: httpx.Client
    process: subprocess.Popen[str]

    @property
    def rss_mib(self) -> float:
        """Resident memory of the process."""
        fields = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", fields)[1]) / 1024


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """`ee-surgery serve` with these arguments, until SIGTERM."""
    command = [sys.executable, "-m", "ee_surgery.cli", "serve", *arguments, "--port", "0", "--threads", "1"]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not (found := re.search(r"http://\S+?:\d+", lines[-1] if lines else "")):
                lines.append(process.stdout.readline())
                assert lines[-1], (lines, process.wait(60))
            with httpx.Client(base_url=found[0], timeout=60) as client:
                yield Served(client, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
