"""The checks of one model, in a process of its own: `python -m benchmarks.coverage_checks JOB FOLDER MODEL...`.

JOB is `full`, `reload` (a second process, on what `full` saved), `capture` (on the meta device, nothing is computed) or
`export` (one ONNX file, run beside the model).
What is known is written after every check: a process that dies leaves the results up to there.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ee_surgery as ee
from benchmarks.models import build, sample
from ee_surgery.backbone.inputs import tensors
from ee_surgery.export.verify import ExportCheck, compare
from ee_surgery.graph.backends.base import bind
from ee_surgery.graph.segments import compact, cut
from ee_surgery.onnx import OnnxModel

EXPECTED = "expected.safetensors"
TOLERANCE = 1e-3  # relative to the largest logit; float32 sums in another order
LARGEST_GAIN = 100.0  # of the logits of untrained branches; it multiplies rounding errors as well


class Report:
    """Results so far, on disk after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.row: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def add(self, **results: object) -> None:
        """Keep results."""
        self.row.update(results)
        if self.path is not None:
            self.path.write_text(json.dumps(self.row))


def relative(expected: Tensor, seen: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((expected - seen).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def capture(name: str, report: Report) -> None:
    """Capture the model on the meta device."""
    model = build(name, "meta")
    report.add(device="meta", parameters=sum(p.numel() for p in model.parameters()))
    _inspect(model, name, report)


def _inspect(model: torch.nn.Module, name: str, report: Report) -> ee.ModelGraph:
    start = time.perf_counter()
    try:
        graph = ee.inspect(model, sample(name))
    except ee.CaptureError as error:
        if "num_classes=" not in str(error):
            raise
        graph = ee.inspect(model, sample(name), num_classes=10)
        report.add(head=True)
    report.add(inspect_seconds=round(time.perf_counter() - start, 2))
    reasons = Counter(re.sub(r"\(.*\)|of \S+|dimensions? of \S+", "", point.reason).strip() for point in graph.illegal)
    report.add(
        nodes=len(graph.capture.nodes),
        legal=len(graph.points),
        blocks=len(graph.blocks),
        illegal=len(graph.illegal),
        reason=reasons.most_common(1)[0][0] if reasons else "",
        example=next((point.reason for point in graph.illegal), ""),
        layouts=sorted({point.layout for point in graph.blocks}),
        most_live=max((point.live for point in graph.blocks), default=0),
        gmacs=round(graph.macs / 1e9, 3),
        uncounted=dict(graph.uncounted),
    )
    if not graph.points:
        raise AssertionError("no legal exit point")
    return graph


def _with_exits(graph: ee.ModelGraph) -> ee.EarlyExitModel:
    """Three exits, or as many as there are."""
    return ee.attach(graph, ee.place(graph, min(3, len({p.macs for p in graph.blocks} - {0, graph.macs}))))


def full(name: str, report: Report, folder: Path) -> None:
    """All checks of a model, on its sample."""
    model = build(name)
    report.add(device="cpu", parameters=sum(p.numel() for p in model.parameters()))
    graph = _inspect(model, name, report)
    backbone = graph.backbone
    inputs = backbone.sample
    with torch.no_grad():
        eager = backbone.logits(backbone(inputs))
        (segment,) = cut(graph.capture, graph.liveness, [])
        (whole,) = bind("python", segment, lambda name: model)(*tensors(inputs).values())
        report.add(captured_difference=(whole - eager).abs().max().item())
        assert relative(eager, whole) < TOLERANCE, "captured graph and eager differ"

        branched = _with_exits(graph)
        points = branched.plan.points
        report.add(
            exits=[f"{p.name} ({p.macs_fraction:.0%})" for p in points], branches=[s.name for s in branched.specs]
        )

        rows = torch.tensor([3, 0, 2, 1, 2])
        keeps = [torch.tensor([4, 0, 1, 2]), torch.tensor([2, 0, 3]), torch.tensor([1, 2])]
        given = backbone.batch(inputs).select(rows)
        program = branched.engine.program(given.arguments)
        live = program.stages[0](*given.tensors)
        for keep, stage, segment in zip(keeps, program.stages[1:], program.segments[1:], strict=False):
            rows, live = rows[keep], stage(*compact(live, segment.axes, keep))
        report.add(staged_difference=relative(eager[rows], live[0]))
        assert report.row["staged_difference"] < TOLERANCE, "staged run and whole model differ"
        with branched.exits_disabled():
            assert torch.equal(backbone.logits(branched(inputs)), eager), "never-exit is not the original"

    checked, wrong = _points_anywhere(graph, eager)
    report.add(points_checked=checked, points_wrong=wrong)
    assert not wrong, f"cut at {wrong[0]}, the logits are others"

    before = {key: value.clone() for key, value in branched.branches.state_dict().items()}
    labels = torch.arange(4) % backbone.num_classes
    trained = ee.train(branched, [({**inputs}, labels)], ee.TrainConfig(epochs=1, warmup=0, progress=False))
    moved = [key for key, value in branched.branches.state_dict().items() if not torch.equal(value, before[key])]
    report.add(loss=trained.epochs[0].loss)
    assert moved, "training moved no weight"
    assert trained.epochs[0].skipped == 0, "the loss of the training step is not finite"

    scores = branched.all_exits(inputs)[:-1].softmax(-1).amax(-1).sort(1).values
    branched.operate(thresholds=((scores[:, 1] + scores[:, 2]) / 2).tolist())
    output = branched.predict(inputs)
    receipt = branched.receipt()
    report.add(shares=output.exit_index.bincount(minlength=len(points) + 1).tolist(), receipt=receipt.unchanged)
    assert receipt.unchanged, str(receipt)
    assert isinstance(branched(inputs), type(model(**inputs) if backbone.library == "transformers" else eager))
    branched.save_pretrained(folder / "adapter")
    expected = {"logits": output.logits, "exit_index": output.exit_index}
    save_file({**expected, **{f"input.{n}": t.contiguous() for n, t in tensors(inputs).items()}}, folder / EXPECTED)


def _points_anywhere(graph: ee.ModelGraph, eager: Tensor) -> tuple[int, list[str]]:
    """Cut at random legal points with one of two samples leaving: the number of cuts, and the failures."""
    backbone = graph.backbone
    folded = [p for p in graph.points if graph.features(p).axis.folded]
    drawn = random.Random(0).sample(folded, min(2, len(folded)))
    drawn += random.Random(0).sample(graph.points, min(3, len(graph.points)))
    keep, given = torch.tensor([1]), backbone.batch(backbone.sample).select([0, 3])
    wrong = []
    with torch.no_grad():
        for point in drawn:
            segments = cut(graph.capture, graph.liveness, [point.index])
            first, rest = (bind("python", segment, lambda name: backbone.model) for segment in segments)
            (logits,) = rest(*compact(first(*given.tensors), segments[1].axes, keep))
            if not relative(eager[[3]], logits) < TOLERANCE:
                wrong.append(point.name)
    return len(drawn), wrong


def reload(name: str, report: Report, folder: Path) -> None:
    """A fresh process: the same logits and exits from the saved adapter."""
    branched = ee.from_pretrained(folder / "adapter", build(name), sample=sample(name))
    expected = load_file(folder / EXPECTED)
    prefix = "input."
    output = branched.predict({n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)})
    assert torch.equal(output.exit_index, expected["exit_index"]), "other exits after loading"
    assert torch.equal(output.logits, expected["logits"]), "other logits after loading"
    report.add(reloaded=True)


@torch.no_grad()
def _told_apart(branched: ee.EarlyExitModel) -> None:
    """Untrained branches score every sample alike: center their logits and scale them up to a spread of 1."""
    exits = branched.all_exits(branched.engine.backbone.own_batch().arguments)[:-1]
    for branch, logits in zip(branched.branches, exits, strict=True):
        mean, linear = logits.mean(0), branch.classifier
        gain = (1 / (logits - mean).std()).clamp_max(LARGEST_GAIN)
        linear.weight.mul_(gain)
        linear.bias.copy_(gain * (linear.bias - mean))


def export(name: str, report: Report, folder: Path) -> None:
    """Export, and compare with the routed run at batches 1 and 5, each at ten random settings of the thresholds."""
    branched = _with_exits(_inspect(build(name), name, report))
    _told_apart(branched)
    start = time.perf_counter()
    path = branched.export(folder / "model.onnx", check=False)
    report.add(export_seconds=round(time.perf_counter() - start, 1), megabytes=round(path.stat().st_size / 1e6, 1))
    file, engine = OnnxModel(path, threads=1), branched.engine
    own = engine.backbone.own_batch()
    scores = branched.all_exits(own.arguments)[:-1].softmax(-1).amax(-1)
    low, high, draw = scores.amin(1), scores.amax(1), torch.Generator().manual_seed(0)
    found = ExportCheck(0, 0, 0, 0.0)
    for _ in range(10):  # at some settings all leave, or none
        taus = (low + (1.4 * torch.rand(len(low), generator=draw) - 0.2) * (high - low)).tolist()
        policy = ee.OperatingPoint.by_hand(taus, "max_prob", len(taus)).policy_for(branched.task)
        for rows in (torch.randint(4, (1,), generator=draw), torch.randint(4, (5,), generator=draw)):
            found = found.plus(compare(file, engine, policy, own.select(rows)))
    report.add(export=found._asdict())
    assert not found.exits, f"{found.exits} of {found.samples} samples leave elsewhere"
    assert found.logits < TOLERANCE, f"logits differ by {found.logits:.2g} of the largest"


def main() -> None:
    """Run one job; captures print one line of JSON per model in any case."""
    job, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        report = Report(None if job == "capture" else Path(folder, "report.json"))
        try:
            if job == "capture":
                capture(name, report)
            else:
                {"full": full, "reload": reload, "export": export}[job](name, report, Path(folder))
        except ImportError as error:
            report.add(error=f"cannot be built here: {str(error).strip().splitlines()[0]}")
            if job != "capture":
                raise
        except Exception as error:
            report.add(error=f"{job}: {type(error).__name__}: {str(error)[:500]}")
            if job != "capture":
                raise
        if job == "capture":
            print(json.dumps({"error": "", **report.row}), flush=True)
            build.cache_clear()


if __name__ == "__main__":
    main()
