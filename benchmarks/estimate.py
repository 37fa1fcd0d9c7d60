"""Does `ee.estimate` foretell what `ee.bench` measures? Exits forced by thresholds, random weights, one run.

    python -m benchmarks.estimate                # docs/estimate.md
    python -m benchmarks.estimate --smoke        # one small network; writes nothing

Thresholds are quantiles of the untrained branches' scores, so that about a quarter of the inputs leave at each of the
first two exits. The estimate is asked for the very shares that left.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch

import ee_surgery as ee
from benchmarks.tables import table
from ee_surgery.calibration.profile import processor
from ee_surgery.evaluation.bench import against

NETWORKS = ("resnet50", "vit_small_patch16_224", "mobilenetv2_100")
SIZES = (1, 32)
STAY = (0.75, 0.67)  # shares of those that reach an exit
PAGE = Path("docs/estimate.md")
HEAD = ["network", "batch", "leaving at each exit %", "estimated", "measured", "ratio", "estimate took, s"]
TEXT = """# Estimates

```bash
python -m benchmarks.estimate
```

What `ee.estimate` says before any training, against what `ee.bench` then measures with the same shares leaving: time as
a fraction of the original's. Random weights; exits are forced by thresholds.
"""


def compare(name: str, seconds: float, count: int) -> list[list[str]]:
    """Rows of one network, one for each batch size."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    started = time.perf_counter()
    graph = ee.inspect(model)
    found = ee.estimate(graph, exits=3, batch_sizes=SIZES, seconds=seconds)
    took = time.perf_counter() - started
    branched = ee.attach(graph, ee.place(graph, 3, clip=True))
    inputs = torch.randn(count, *next(iter(branched.sample.values())).shape[1:])
    records = ee.record(branched, [inputs])
    scores, thresholds = records.scores("max_prob"), []
    there = torch.ones(len(records), dtype=torch.bool)
    for k in range(len(records.exits)):
        tau = scores[k][there].quantile(STAY[k]).item() if k < len(STAY) else float("inf")
        thresholds.append(tau)
        there &= scores[k] < tau
    branched.operate(thresholds=thresholds)
    shares = [(branched.predict(inputs).exit_index == k).double().mean().item() for k in range(len(records.exits))]
    rows = []
    for size in SIZES:
        measured = against(branched, {}, inputs, batch_size=size, rounds=5)["exits"]
        estimated = found.time(shares, size)
        left = " ".join(f"{100 * share:.0f}" for share in shares)
        rows.append(
            [name, str(size), left, f"{estimated:.3f}", f"{measured:.3f}", f"{estimated / measured:.3f}", f"{took:.0f}"]
        )
    return rows


def main() -> None:
    """Compare all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks = ("test_resnet",) if options.smoke else NETWORKS
    rows = [row for name in networks for row in compare(name, *((1.0, 32) if options.smoke else (15.0, 64)))]
    made = f"{options.threads} thread(s), {processor(torch.device('cpu'))}, torch {torch.__version__}."
    text = f"{TEXT}\n{table(HEAD, rows)}\n\n{made}\n"
    print(text)
    if not options.smoke:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
