"""Check every family of timm and every image classifier of transformers, one process each.

    python -m benchmarks.coverage                  models not in runs/coverage.jsonl yet; then docs/coverage.md
    python -m benchmarks.coverage timm:tnt         models of that name again
    python -m benchmarks.coverage --architectures  every architecture of timm, captured on the meta device
    python -m benchmarks.coverage --export         every model of the first list as an ONNX file
    python -m benchmarks.coverage --report         docs/coverage.md alone

A model that crashes, hangs or runs out of memory ends only its own process and is listed with the cause.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import coverage_page, models
from benchmarks.tables import results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="run these again (timm:name, hf:Class)")
    parser.add_argument("--architectures", action="store_true", help="the long matrix: capture alone, no weights")
    parser.add_argument("--export", action="store_true", help="as one ONNX file, run beside the model")
    parser.add_argument("--report", action="store_true", help="only write the page, with --export that of ONNX files")
    parser.add_argument("--smallest", action="store_true", help="print the smallest model of every timm family")
    parser.add_argument("--smoke", action="store_true", help="two small models; nothing is kept")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=600, help="limit of one model")
    parser.add_argument("--memory", type=int, default=16, help="limit of one model in GiB of address space")
    options = parser.parse_args()
    if options.smallest:
        print(json.dumps(models.smallest(), indent=4))
    elif options.smoke:
        options.models = ["timm:resnet10t", "hf:PPLCNetForImageClassification"]
        with tempfile.TemporaryDirectory() as folder:
            run(options, Path(folder))
            coverage_page.write(Path(folder), Path(folder, "coverage.md"))
            print(Path(folder, "coverage.md").read_text())
            if any(row["error"] for row in results(Path(folder, "coverage.jsonl"))):
                sys.exit(1)
    else:
        if not options.report:
            run(options, RESULTS)
        if options.export:
            coverage_page.write_exports(RESULTS, ROOT / "docs" / "coverage-onnx.md")
        else:
            coverage_page.write(RESULTS, ROOT / "docs" / "coverage.md")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Check every model that has no result yet; each result is appended as it comes."""
    folder.mkdir(exist_ok=True)
    matrix = "architectures" if options.architectures else "exports" if options.export else "coverage"
    file = folder / f"{matrix}.jsonl"
    todo = models.architectures() if options.architectures else [*models.families(), *models.transformers_classes()]
    known = set() if options.models else {row["model"] for row in results(file)}
    todo = [name for name in todo if name not in known and (not options.models or name in options.models)]
    print(f"{len(todo)} models to run, {len(known)} known", flush=True)
    # Capturing takes less time than importing: those models share a process until one of them breaks it.
    groups = (
        [todo[i :: options.workers] for i in range(options.workers)] if options.architectures else [[n] for n in todo]
    )

    def one(names: list[str]) -> None:
        rows = captured(names, options) if options.architectures else [checked(names[0], options)]
        for row in rows:
            with file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{row['model']}: {row['error'] or 'ok'} ({row['seconds']} s)", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, groups))


def start(job: str, names: list[str], folder: str, memory: int) -> subprocess.Popen[str]:
    """A process for one job, one thread, within its memory."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage_checks", job, folder, *names],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if job != "capture" else subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory * GIB, memory * GIB)),
    )


def checked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All checks of one model; `reload` is a second process, which loads what the first saved."""
    begin = time.perf_counter()
    error = ""
    with tempfile.TemporaryDirectory() as folder:
        for job in ("export",) if options.export else ("full", "reload"):
            process = start(job, [name], folder, options.memory)
            try:
                _, messages = process.communicate(timeout=options.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                error = f"{job}: no end within {options.seconds} s"
            else:
                if process.returncode:
                    error = f"{job}: exit {process.returncode}: {(messages.strip().splitlines() or [''])[-1][:300]}"
            if error:
                break
        report = Path(folder, "report.json")
        row = json.loads(report.read_text()) if report.exists() else {}
    return {"model": name, **row, "error": row.get("error") or error, "seconds": round(time.perf_counter() - begin, 1)}


def captured(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Captures on the meta device, one after the other; a new process after one that broke or hung."""
    left = list(names)
    while left:
        process = start("capture", left, "", options.memory)
        assert process.stdout is not None
        while left:
            begin = time.perf_counter()
            watchdog = threading.Timer(options.seconds, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            seconds = round(time.perf_counter() - begin, 1)
            name = left.pop(0)
            if not line:
                yield {"model": name, "error": f"the process died or hung ({options.seconds} s)", "seconds": seconds}
                break
            yield {"model": name, **json.loads(line), "seconds": seconds}
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
