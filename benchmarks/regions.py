"""Leaving by region, a trial: tiles of a picture that are sure keep the exit's map, the others alone run on.

    python -m recipes.camvid --network espnet && python -m benchmarks.regions runs/camvid/espnet      # docs/regions.md

The rest of the network runs on crops of the live maps: a tile and a margin around it, all of one size, as one batch.
Thresholds are quantiles over all tiles shown, so that equal shares of the picture leave; beside them, whole pictures
leave in equal shares. Times are of everything after the input, in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ee_surgery as ee
from benchmarks.tables import table
from ee_surgery.calibration.profile import processor
from ee_surgery.task import SEGMENTATION
from ee_surgery.task.segmentation import mean_iou
from recipes import camvid

SHARES = (0.25, 0.5, 0.75)
TILES = ((3, 3), (3, 4), (5, 5))
MARGINS = (0, 40, 80)  # pixels
PAGE = Path("docs/regions.md")


class Cut(NamedTuple):
    """A tile with its margin, inside the picture: where the crop begins, and where the tile lies in it; in pixels."""

    top: int
    left: int
    inner: tuple[slice, slice]
    """In the crop."""
    outer: tuple[slice, slice]
    """In the picture."""


def cuts(tiles: tuple[int, int], margin: int) -> tuple[list[Cut], tuple[int, int]]:
    """All tiles of a picture, and the size of their crops."""
    height, width = camvid.SIZE[0] // tiles[0], camvid.SIZE[1] // tiles[1]
    size = min(height + 2 * margin, camvid.SIZE[0]), min(width + 2 * margin, camvid.SIZE[1])
    found = []
    for row in range(tiles[0]):
        for column in range(tiles[1]):
            y, x = row * height, column * width
            top = min(max(0, y - margin), camvid.SIZE[0] - size[0])
            left = min(max(0, x - margin), camvid.SIZE[1] - size[1])
            inner = slice(y - top, y - top + height), slice(x - left, x - left + width)
            found.append(Cut(top, left, inner, (slice(y, y + height), slice(x, x + width))))
    return found, size


class Rest:
    """The network behind the first exit, on crops of what is live there."""

    def __init__(self, branched: ee.EarlyExitModel) -> None:
        self.branched = branched

    def of(self, size: tuple[int, int]) -> Callable[..., Tensor]:
        """Its stages for crops of this size, as one call."""
        stages = self.branched.engine.program(torch.zeros(2, 3, *size)).stages[1:]

        def run(*live: Tensor) -> Tensor:
            for stage in stages:
                live = stage(*live)
            return live[0]

        return run


def cropped(live: tuple[Tensor, ...], chosen: list[Cut], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """The crops of one picture's live maps, as a batch."""
    found = []
    for map in live:
        stride = camvid.SIZE[0] // map.shape[-2]
        h, w = size[0] // stride, size[1] // stride
        tops = [(cut.top // stride, cut.left // stride) for cut in chosen]
        found.append(torch.cat([map[:, :, y : y + h, x : x + w] for y, x in tops]))
    return tuple(found)


def trial(branched: ee.EarlyExitModel, images: Tensor, labels: Tensor) -> list[list[str]]:
    """A row for whole pictures and for each tiling and margin, at each share that leaves."""
    program, task = branched.engine.program(images[:2]), branched.task
    first, read, branch = program.stages[0], program.readers[0], branched.branches[0]
    whole = Rest(branched).of(camvid.SIZE)
    target = task.check_target(labels, 12, len(labels))
    rows, exits, ends, lives, before, behind = [], [], [], [], [], []
    with torch.no_grad():
        for image in images:
            started = time.perf_counter()
            live = first(image[None])
            logits = task.enlarge(branch(*read(live)).logits, program.answer)
            between = time.perf_counter()
            end = whole(*live)
            before.append(between - started)
            behind.append(time.perf_counter() - between)
            exits.append(logits[0])
            ends.append(end[0])
            lives.append(live)
    early, late = torch.stack(exits), torch.stack(ends)
    sure = torch.softmax(early, 1).amax(1)  # (N, H, W)
    start, rest = statistics.median(before), statistics.median(behind)
    original = _original(branched, images)

    def row(name: str, share: float, answers: Tensor, seconds: float, differs: float | None) -> list[str]:
        right, iou = _measured(answers, target)
        return [
            name, f"{100 * share:.0f}", f"{100 * right:.2f}", f"{100 * iou:.1f}", f"{seconds / original:.2f}",
            "" if differs is None else f"{100 * differs:.2f}",
        ]  # fmt: skip

    rows.append(row("original", 0, late.argmax(1), original, None))
    rows.append(row("first exit", 1, early.argmax(1), start, None))
    of_pictures = sure.flatten(1).mean(1)
    for share in SHARES:
        leaves = of_pictures >= of_pictures.quantile(1 - share)
        answers = torch.where(leaves[:, None, None], early.argmax(1), late.argmax(1))
        gone = leaves.double().mean().item()
        rows.append(row("whole pictures", gone, answers, start + (1 - gone) * rest, None))
    for tiles in TILES:
        for margin in MARGINS:
            found, size = cuts(tiles, margin)
            run = Rest(branched).of(size)
            scores = torch.stack([sure[:, c.outer[0], c.outer[1]].flatten(1).mean(1) for c in found], 1)  # (N, tiles)
            for share in SHARES:
                stays = scores < scores.quantile(1 - share)
                answers, seconds, differ = early.argmax(1), [], []
                for i, live in enumerate(lives):
                    chosen = [cut for cut, stay in zip(found, stays[i].tolist(), strict=True) if stay]
                    started = time.perf_counter()
                    if chosen:
                        with torch.no_grad():
                            logits = run(*cropped(live, chosen, size))
                        for cut, one in zip(chosen, logits, strict=True):
                            answers[i][cut.outer] = one[:, cut.inner[0], cut.inner[1]].argmax(0)
                    seconds.append(time.perf_counter() - started)
                    differ += [
                        (answers[i][c.outer] != late[i].argmax(0)[c.outer]).double().mean().item() for c in chosen
                    ]
                name = f"{tiles[0]} x {tiles[1]} tiles, margin {margin} px"
                spent = start + statistics.mean(seconds)
                gone = 1 - stays.double().mean().item()
                rows.append(row(name, gone, answers, spent, statistics.mean(differ)))
    return rows


def _original(branched: ee.EarlyExitModel, images: Tensor) -> float:
    """Seconds of the original for a picture."""
    seconds = []
    for image in images:
        started = time.perf_counter()
        with torch.no_grad():
            branched.backbone(image[None])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _measured(answers: Tensor, target: Tensor) -> tuple[float, float]:
    """Pixel accuracy and mean IoU of maps of classes (N, H, W)."""
    one_hot = torch.nn.functional.one_hot(answers, 12).permute(0, 3, 1, 2).float()
    return SEGMENTATION.outcome(one_hot, target).mean().item(), mean_iou(SEGMENTATION.tally(one_hot, target))


CONCLUSION = """
**No.** Whole pictures that leave in equal shares cost less at equal accuracy. Behind this exit are six blocks with a
dilation of 16 at an eighth of the size: each reads 128 pixels to every side, so that exact answers need the whole
picture, whatever the tile. Without a margin, tiles that run on differ from the whole picture's map in more pixels than
the original is wrong in; with margins that keep the difference small, crops overlap so much that they cost more than
the picture. So it is not built: a picture leaves whole.
"""
HEAD = ["", "leaves %", "pixel accuracy %", "mIoU %", "time", "differs from the whole %"]
TEXT = """# Leaving by region: a trial

```bash
python -m recipes.camvid --network espnet && python -m benchmarks.regions runs/camvid/espnet
```

Could the sure tiles of a picture keep the exit's map, while the others alone run on? ESPNet on CamVid, {count} test
pictures, first exit `{exit}`: what is behind it runs on crops of the live maps, a tile and a margin, as one batch.
*Time* is a fraction of the original's; *differs* says in how many pixels of the tiles that ran on the answer is not
that of the whole picture, since beyond its margin a tile sees zeros.
"""


def main() -> None:
    """Run the trial and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48, help="test pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, mean, std = camvid.network(options.folder.name)
    branched = ee.from_pretrained(options.folder / "adapter", model, sample=torch.zeros(2, 3, *camvid.SIZE))
    scenes = camvid.scenes("test", options.count)
    images = (scenes.images.float() / 255 - mean) / std
    rows: Any = trial(branched, images, scenes.labels.long())
    made = f"1 thread, {processor(torch.device('cpu'))}, torch {torch.__version__}."
    text = TEXT.format(count=options.count, exit=branched.exits[0])
    PAGE.write_text(f"{text}\n{table(HEAD, rows)}\n\n{made}\n{CONCLUSION}")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
