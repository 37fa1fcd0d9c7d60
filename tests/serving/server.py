"""A served adapter in a process of its own, for tests: real HTTP over loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import timm
import torch

import ee_surgery as ee
from tests import ROOT

SIDE = 64


def adapter(folder: Path) -> tuple[Path, Path, ee.EarlyExitModel]:
    """A calibrated adapter of a tiny timm network, the file of its weights, and the model itself."""
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=1000).eval()
    torch.save(base.state_dict(), folder / "weights.pt")
    branched = ee.augment(base, 2, sample=torch.randn(4, 3, SIDE, SIDE))
    branched.preprocessing = {**branched.preprocessing, "input_size": [3, SIDE, SIDE]}
    branched.save_pretrained(folder / "adapter")
    return folder / "adapter", folder / "weights.pt", branched


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """`ee-surgery serve` with these arguments, and a client of it."""
    command = [sys.executable, "-m", "ee_surgery.cli", "serve", *arguments, "--port", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not (found := re.search(r"http://\S+?:\d+", lines[-1] if lines else "")):
                line = process.stdout.readline()
                assert line, (lines, process.wait(60))
                lines.append(line)
            with httpx.Client(base_url=found[0], timeout=60) as client:
                yield client, process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def rss_mib(process: subprocess.Popen[str]) -> float:
    """Resident memory of a process."""
    fields = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", fields)[1]) / 1024


def wait_for(condition: object, seconds: float = 60) -> None:
    """Until a function returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
