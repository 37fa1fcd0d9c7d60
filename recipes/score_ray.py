# pyright: reportMissingImports=false
"""Score a data set offline with Ray Data: actors of one Engine each, whose late stages see full batches.

    pip install 'ee-surgery[ray]'
    python -m recipes.score_ray runs/adapter pictures --out scores --budget 0.6 --actors 4

Reads all pictures of a folder, on a disk that all nodes share, and writes Parquet: path, class, exit, score, and MACs
as a fraction of the original's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import nn

import ee_surgery as ee
from ee_surgery.serving.knob import move

_REQUEST = 16  # samples; a block is that many times as large, so that the last stages have a full batch of survivors


class Scorer:
    """An actor: the model and its engine are made once."""

    def __init__(
        self, adapter: str, base: Callable[[], nn.Module] | None, request: Mapping[str, Any] | None, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.branched = ee.from_pretrained(adapter, None if base is None else base())
        if request is not None:
            move(self.branched, request)
        self.transform = self.branched.transform()
        self.engine = ee.Engine(self.branched)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A block of rows, with `pixels` (B, C, H, W) that are prepared, or pictures in `image` as Ray reads them."""
        if "image" in block:
            from PIL import Image

            pictures = map(Image.fromarray, block.pop("image"))
            pixels = torch.stack([torch.as_tensor(self.transform(picture)) for picture in pictures])
        else:
            pixels = torch.from_numpy(np.stack([*block.pop("pixels")]))
        answers: list[Any] = [*self.engine.map(pixels.split(_REQUEST))]
        task = self.branched.task
        found = {
            "class": torch.cat([task.labels_from(each.logits) for each in answers]),
            "exit": torch.cat([each.exit_index for each in answers]),
            "score": torch.cat([each.score for each in answers]),
            "macs_fraction": torch.cat([each.macs_fraction for each in answers]),
        }
        return {**block, **{name: values.cpu().numpy() for name, values in found.items()}}


def score(
    rows: Any,
    adapter: str,
    base: Callable[[], nn.Module] | None = None,
    request: Mapping[str, Any] | None = None,
    *,
    actors: int = 1,
    threads: int = 1,
    block: int = 1024,
) -> Any:
    """A data set with answers in place of pictures.

    Args:
        rows: a `ray.data.Dataset` with `image` or `pixels`, see `Scorer`; other columns stay.
        adapter: folder or repository, as every node finds it.
        base: makes the original; by default its library does.
        request: for an operating point, as `PUT /knob` takes it; None: the stored one.
        actors: how many.
        threads: of torch, each.
        block: rows that an actor has at a time: the more, the fuller are the batches of late stages.
    """
    arguments = {"adapter": adapter, "base": base, "request": request, "threads": threads}
    pool = ray.data.ActorPoolStrategy(size=actors)
    return rows.map_batches(Scorer, fn_constructor_kwargs=arguments, batch_size=block, compute=pool, num_cpus=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or repository")
    parser.add_argument("pictures", help="folder")
    parser.add_argument("--out", required=True, help="folder for Parquet files")
    parser.add_argument("--budget", type=float, help="mean MACs as a fraction of the original's")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch, per actor")
    options = parser.parse_args()
    request = None if options.budget is None else {"budget": options.budget}
    rows = ray.data.read_images(options.pictures, mode="RGB", include_paths=True)
    found = score(rows, options.adapter, None, request, actors=options.actors, threads=options.threads)
    found.write_parquet(options.out)
    share = found.mean("macs_fraction")
    print(f"wrote {options.out}: {found.count()} pictures at {share:.1%} of the original's MACs")


if __name__ == "__main__":
    main()
