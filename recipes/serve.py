# pyright: reportMissingImports=false
"""Serve an adapter with Ray Serve: replicas of one Engine each, on one machine or many.

    pip install 'ee-surgery[ray]'
    python -m recipes.serve                      # a tiny network of its own, untrained: to try it
    python -m recipes.serve runs/adapter --replicas 4 --budget 0.6 --audit 0.02
    curl -T picture.jpg -X POST -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

`--smoke` starts the tiny one, asks it over HTTP, moves the knob of both replicas, and stops.
"""

from __future__ import annotations

import argparse
import logging
import socket
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import ee_surgery as ee


def tiny() -> nn.Module:
    """The original of the tiny adapter, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=10).eval()


def tiny_adapter(folder: Path) -> str:
    """Write an adapter of the tiny network, calibrated on noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        branched = ee.augment(tiny(), 2, sample=torch.randn(4, 3, 64, 64))
        branched.preprocessing = {**(branched.preprocessing or {}), "input_size": [3, 64, 64]}
        ee.train(branched, [torch.randn(16, 3, 64, 64)], ee.TrainConfig(epochs=1, teach="original"))
        ee.calibrate(branched, [torch.randn(64, 3, 64, 64)])
    branched.operate(max_accuracy_drop=0.05)
    branched.save_pretrained(folder)
    print(f"Original {branched.receipt()}")
    return str(folder)


def smoke(service: Any, url: str) -> None:
    """One conversation with both replicas."""
    import httpx

    x = torch.randn(3, 3, 64, 64)
    branched = ee.from_pretrained(service.adapter, tiny())
    with httpx.Client(base_url=url, timeout=60) as client:
        for request in ({"point": 0}, {"off": True}):
            service.move(request)
            branched.operate(None if "off" in request else branched.frontier[0] if branched.frontier else None)
            expected = [[*branched.exits, "original"][k] for k in branched.predict(x).exit_index.tolist()]
            for _ in range(8):  # of both replicas
                answer = client.post("/predict", json={"inputs": x.tolist()}).raise_for_status().json()
                assert [each["exit"] for each in answer] == expected, (answer, expected)
    print(f"answered over HTTP at {url}: exits {expected} with the knob off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", help="folder or repository; a tiny one by default")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch, per replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--budget", type=float, help="mean MACs as a fraction of the original's")
    parser.add_argument("--audit", type=float, metavar="EPSILON", help="limit of the risk, tested in service")
    parser.add_argument("--out", type=Path, help="folder for the tiny adapter; a temporary one by default")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    import ray
    from ray import serve

    from ee_surgery.serving.ray import RayService

    if options.smoke:
        with socket.create_server((options.host, 0)) as free:
            options.port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        adapter = options.adapter or tiny_adapter((options.out or Path(temporary)) / "adapter")
        service = RayService(
            adapter=adapter,
            base=None if options.adapter else tiny,
            threads=options.threads,
            epsilon=options.audit,
            options={"num_replicas": options.replicas, "ray_actor_options": {"num_cpus": 0 if options.smoke else 1}},
        )
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
        serve.start(http_options={"host": options.host, "port": options.port}, logging_config={"log_level": "WARNING"})
        try:
            service.run(None if options.budget is None else {"budget": options.budget}, blocking=not options.smoke)
            if options.smoke:
                smoke(service, f"http://{options.host}:{options.port}")
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
