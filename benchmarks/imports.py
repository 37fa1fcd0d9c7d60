"""What `import ee_surgery` loads: seconds and modules, by package. `python -m benchmarks.imports`.

torch takes most of it: `--code 'import torch'` tells how much. Seconds are the median of several fresh
interpreters on warm files, each module's own time as `python -X importtime` tells it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict

from rich import box
from rich.console import Console
from rich.table import Table

_LINE = re.compile(r"import time: +(\d+) \| +\d+ \|( +)(\S+)")


def load(code: str) -> tuple[dict[str, float], Counter[str]]:
    """Seconds and modules of each top-level package that one run of `code` imports."""
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = defaultdict[str, float](float), Counter[str]()
    for own, _, name in _LINE.findall(run.stderr):
        package = name.partition(".")[0]
        seconds[package] += int(own) / 1e6
        modules[package] += 1
    return seconds, modules


def main() -> None:
    """Print the packages that take longest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", default="import ee_surgery")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    times: defaultdict[str, list[float]] = defaultdict(list)
    modules, totals = Counter[str](), []
    for _ in range(options.runs):
        seconds, modules = load(options.code)
        totals.append(sum(seconds.values()))
        for name, value in seconds.items():
            times[name].append(value)
    table = Table("package", "seconds", "modules", box=box.MARKDOWN)
    for name in sorted(times, key=lambda name: -statistics.median(times[name]))[: options.rows]:
        table.add_row(name, f"{statistics.median(times[name]):.3f}", str(modules[name]))
    table.add_row("all", f"{statistics.median(totals):.3f}", str(modules.total()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
