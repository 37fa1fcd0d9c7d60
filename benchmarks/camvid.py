"""Exits on street scenes against the original and its smaller siblings, by measured time.

    python -m recipes.camvid && python -m benchmarks.camvid runs/camvid/espnetv2_150     # docs/camvid.md

Branches and records are those of `recipes.camvid`. Thresholds are chosen by time, on the drive held out; accuracy is
that of the test pictures, and time is measured on some of them: original, exits and siblings in turn, in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.methods_compare import append, read
from benchmarks.tables import table
from ee_surgery.calibration.profile import Profile, processor
from ee_surgery.calibration.search import best_score
from ee_surgery.evaluation.bench import against
from ee_surgery.task import SEGMENTATION
from recipes.camvid import SIZE, Pictures, network, scenes

SIBLINGS = {"espnet": (), "espnetv2_150": ("espnetv2_100", "espnetv2_050")}
DROPS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
EPS, DELTA, SPLITS = 0.02, 0.1, 20
RESULTS, PAGE = Path("benchmarks/results/camvid.jsonl"), Path("docs/camvid.md")
Row = dict[str, Any]


def points(profile: Profile, calibrating: ee.ExitRecords, test: ee.ExitRecords) -> list[Row]:
    """Operating points by time, chosen on one set of records, on the other."""
    frontier = ee.Frontier.of(calibrating, best_score(profile.in_time(calibrating)), profile)
    found: list[Row] = []
    for drop in DROPS:
        point = frontier.at(max_accuracy_drop=drop)
        if any(row["thresholds"] == list(point.thresholds) for row in found):
            continue  # the same point as for a smaller drop
        replay = test.replay(point.policy)
        own = profile.timed(test, point)
        found.append(
            {
                "accepted": drop,
                "thresholds": list(point.thresholds),
                "score": str(point.score),
                "pixel_accuracy": replay.outcome.mean().item(),
                "agreement": test.agreement[replay.answer_index, torch.arange(len(test))].mean().item(),
                "macs": own.macs_fraction,
                "expected_time": (own.latency_ms or 0) / profile.full_ms,
                "shares": list(own.exit_shares),
                **test.measures(replay.answer_index),
                "point": point,
            }
        )
    return found


def by_iou(branched: ee.EarlyExitModel, name: str) -> ee.ExitRecords:
    """Records of test whose outcome is the IoU of each picture, which is nearer to mIoU than pixel accuracy is."""
    model, mean, std = network(name)
    other = ee.augment(model, branched.plan, branch=branched.specs, sample=branched.sample, task="segmentation_iou")
    other.branches.load_state_dict(branched.branches.state_dict())
    return ee.record(other, Pictures(scenes("test", None), mean, std, labels=True), batch_size=4)


def on_halves(profile: Profile, test: ee.ExitRecords) -> list[Row]:
    """Thresholds by the IoU of one half of test, results on the other, both ways, over random splits; mean rows."""
    rows: dict[float, list[Row]] = {drop: [] for drop in DROPS}
    for seed in range(SPLITS // 2):
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        halves = order[: len(test) // 2], order[len(test) // 2 :]
        for choosing, reported in (halves, halves[::-1]):
            seen, new = test.take(choosing), test.take(reported)
            frontier = ee.Frontier.of(seen, best_score(profile.in_time(seen)), profile)
            for drop in DROPS:
                rows[drop].append(_one_half(profile, new, frontier.at(max_accuracy_drop=drop)))
    found: list[Row] = []
    for drop, of_drop in rows.items():
        names = ("mean_iou", "below", "macs", "expected_time")
        means = {name: statistics.mean(row[name] for row in of_drop) for name in names}
        shares = [statistics.mean(each) for each in zip(*(row["shares"] for row in of_drop), strict=True)]
        spread = statistics.stdev(row["below"] for row in of_drop)
        found.append({"accepted": drop, **means, "spread": spread, "shares": shares})
    return found


def _one_half(profile: Profile, new: ee.ExitRecords, point: ee.OperatingPoint) -> Row:
    """What a point gives on pictures that have not chosen it."""
    replay, own = new.replay(point.policy), profile.timed(new, point)
    measured, original = new.measures(replay.answer_index), new.measures()
    return {
        "mean_iou": measured["mean_iou"],
        "below": original["mean_iou"] - measured["mean_iou"],
        "macs": own.macs_fraction,
        "expected_time": (own.latency_ms or 0) / profile.full_ms,
        "shares": list(own.exit_shares),
    }


def certified(calibrating: ee.ExitRecords, test: ee.ExitRecords) -> Row:
    """Pixel disagreement of at most 2 % per picture, certified on two thirds of all pictures, on the third left."""
    both = [records.unlabelled() for records in (calibrating, test)]
    recorded = {name: torch.cat([each.recorded[name] for each in both], 1) for name in both[0].recorded}
    pool = replace(both[0], outcomes=torch.cat([each.outcomes for each in both], 1), recorded=recorded)
    broken, shares = 0, []
    for seed in range(SPLITS):
        rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        certifying, rest = rows[len(rows) // 3 :], rows[: len(rows) // 3]
        point = ee.risk_control(pool.take(certifying), EPS, DELTA, risk="pixel_disagreement")
        replay = pool.take(rest).replay(point.policy)
        broken += replay.outcome.mean().item() < 1 - EPS
        shares.append(1 - (replay.exit_index == len(test.exits)).double().mean().item())
    return {"splits": SPLITS, "broken": broken, "leaving": statistics.mean(shares)}


def report(folder: Path, smoke: bool) -> Row:
    """Accuracy against measured time, beside the smaller networks."""
    found: Row = json.loads((folder / "training.json").read_text())
    calibrating, test = (ee.ExitRecords.load(folder / f"{name}.safetensors") for name in ("calibrating", "test"))
    name, few = found["network"], 4 if smoke else 16
    branched = ee.from_pretrained(folder / "adapter", network(name)[0], sample=torch.zeros(2, 3, *SIZE))
    profile = ee.profile(branched, inputs(name, 4, few), batch_size=1, seconds=1 if smoke else 60)
    rows = points(profile, calibrating, test)
    others = {}
    for other in SIBLINGS[name]:
        model, mean, std = network(other)
        sibling = ee.augment(model, 1, sample=torch.zeros(2, 3, *SIZE))
        others[other] = sibling, inputs(other, few, few)
        found["siblings"] = {**found.get("siblings", {}), other: static(model, mean, std, smoke)}
    halves = [] if smoke else on_halves(profile, by_iou(branched, name))
    for row in rows:
        branched.operate(row.pop("point"))
        for size in (1, 4):
            row[f"time_{size}"] = against(branched, others, inputs(name, few, few), batch_size=size, rounds=3)
    found |= {
        "original": {"pixel_accuracy": test.base_accuracy, **test.measures()},
        "alone": [test.measures(torch.full((len(test),), k)) for k in range(len(test.exits))],
        "alone_agreement": test.agreement[:-1].mean(1).tolist(),
        "profile": profile.to_dict(),
        "rows": rows,
        "halves": halves,
        "certificate": certified(calibrating, test),
        "device": processor(torch.device("cpu")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return found


def inputs(name: str, count: int, of: int) -> Tensor:
    """Test pictures as a network takes them, evenly spaced."""
    _, mean, std = network(name)
    pictures = Pictures(scenes("test", None), mean, std, labels=False)
    step = len(pictures) // max(count, of)
    return torch.stack([pictures[i * step] for i in range(count)])


def static(model: nn.Module, mean: Tensor, std: Tensor, smoke: bool) -> Row:
    """Measures of a network alone on test."""
    tallies, right = [], []
    for image, label in Pictures(scenes("test", 4 if smoke else None), mean, std, labels=True):
        target = SEGMENTATION.check_target(label[None], 12, 1)
        with torch.no_grad():
            logits = model(image[None])
        tallies.append(SEGMENTATION.tally(logits, target))
        right.append(SEGMENTATION.outcome(logits, target))
    whole = torch.cat(tallies)
    measures = {name: of(whole) for name, of in SEGMENTATION.measures.items()}
    return {"pixel_accuracy": torch.cat(right).mean().item(), **measures}


def part(found: Row) -> str:
    """The results as Markdown."""
    head = ["", "mIoU %", "pixel accuracy %", "MACs %", "time, batch 1", "time, batch 4", "leaving at each exit %"]
    rows = [_row("original", found["original"], ["100.0", "1", "1", ""])]
    last = found["rows"][-1]
    for row in found["rows"]:
        times = [_time(row[f"time_{size}"], "exits") for size in (1, 4)]
        shares = " ".join(f"{100 * share:.0f}" for share in row["shares"])
        rows.append(
            _row(f"exits, {100 * row['accepted']:g} points accepted", row, [f"{100 * row['macs']:.1f}", *times, shares])
        )
    for row in found.get("halves", ()):
        shares = " ".join(f"{100 * share:.0f}" for share in row["shares"])
        below = f"{-100 * row['below']:+.1f} ± {100 * row['spread']:.1f}"
        named = f"halves of test, {100 * row['accepted']:g} points of IoU accepted: {below}"
        time = f"{row['expected_time']:.2f} expected"
        rows.append([named, f"{100 * row['mean_iou']:.2f}", "", f"{100 * row['macs']:.1f}", time, "", shares])
    for name, measures in found.get("siblings", {}).items():
        rows.append(_row(name, measures, ["", *(_time(last[f"time_{size}"], name) for size in (1, 4)), ""]))
    alone = ", ".join(
        f"`{name}` {100 * one['mean_iou']:.1f}" for name, one in zip(found["exits"], found["alone"], strict=True)
    )
    promise = found["certificate"]
    return "\n\n".join(
        [
            table(head, rows),
            f"Exits alone, mIoU %: {alone}. Pixel disagreement of at most {EPS:.0%} per picture, certified (delta "
            f"{DELTA:g}) on two thirds of the pictures of the third drive and of test: broken on {promise['broken']} "
            f"of {promise['splits']} other thirds; {promise['leaving']:.0%} of the pictures leave.",
            f"{found['network']}, {'labels' if found['labels'] else 'no labels'}, {found['epochs']} epochs in "
            f"{found['minutes']:.0f} min, seed {found['seed']}; {found['threads']} thread(s), {found['device']}, torch "
            f"{found['torch']}.",
        ]
    )


def _row(name: str, measures: Row, more: list[str]) -> list[str]:
    return [name, f"{100 * measures['mean_iou']:.2f}", f"{100 * measures['pixel_accuracy']:.2f}", *more]


def _time(times: Any, name: str) -> str:
    return f"{times[name]:.2f}" if isinstance(times, dict) and name in times else "1"


_PAGE = """# Street scenes

```bash
python -m recipes.camvid && python -m benchmarks.camvid runs/camvid/espnetv2_150
python -m recipes.camvid --network espnet && python -m benchmarks.camvid runs/camvid/espnet
python -m recipes.camvid --without-labels --out runs/free && python -m benchmarks.camvid runs/free/espnetv2_150
```

CamVid, 233 test pictures of 360 x 480, 11 classes. The original is frozen; branches (`dense`) learned from two of the
three training drives, thresholds were chosen on the third by pixel accuracy and by time, and test is reported: 62 of
its pictures are of a drive that trained the branches, 171 of one that nothing here has seen. MACs count every branch
visited, as fractions of the original's. Times are of test pictures, measured in one run with the original's, as
fractions of it. *Halves of test*: thresholds by time and by each picture's mean IoU on one half of test, results on
the other, both ways, over 10 random splits, with the difference to the original in points of mIoU.

ESPNetv2 was trained on Cityscapes and has never seen CamVid: where its branches learn with labels, even the first is
better than it, and all pictures leave there. What is saved then is the rest of the encoder and the decoder, which works
on large maps: 0.73 of the MACs are a third of the time. Branches that are better than the
original disagree with it, so that the certificate of agreement lets no picture leave.

Without labels (`--without-labels`), branches learn ESPNetv2's own maps. They agree with 88 % and 91 % of its pixels
on the third drive, as accurate as it is on test (84.7 % and 85.4 %, it 85.5 %): with 2 points of IoU accepted on
one half of test, 0.4 are lost on the other, at 0.61 of the time. The certificate of 2 % still lets no picture
leave: policies with up to a tenth of the pictures leaving can be certified, but all pictures pay for the branches
that they visit, so that closed exits are cheaper.

ESPNet was trained on all three drives and knows the third by heart, 95 % of its pixels; its branches have not seen it.
So drops on that drive are far larger than on test, where the second exit is as good as the original: ask for 4 points
there to lose none, or choose thresholds on pictures that the original has not learned from either.
"""


def main() -> None:
    """Report one folder, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="that recipes.camvid wrote; without one, the page alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few pictures; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.smoke and options.folder is None:
        with tempfile.TemporaryDirectory() as out:
            given = ["--smoke", "--out", out, "--threads", str(options.threads)]
            subprocess.run([sys.executable, "-m", "recipes.camvid", *given], check=True)
            print(part(report(Path(out) / "espnetv2_150", smoke=True)))
        return
    if options.folder is not None:
        found = report(options.folder, options.smoke)
        print(part(found))
        if options.smoke:
            return
        append(RESULTS, found)
    parts = {(line["network"], line["labels"]): part(line) for line in read(RESULTS)}
    PAGE.write_text("\n\n".join([_PAGE.strip(), *parts.values()]) + "\n")


if __name__ == "__main__":
    main()
