"""One HTML file that shows what a branched model does: frontier with a slider, exits, samples that leave at each."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from ee_surgery.branches import BranchSpec
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.plots import blank_figure, draw_steps, label_axes
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import count, instance, optional
from ee_surgery.data.batches import Data, batches
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import DataError
from ee_surgery.evaluation.bench import Bench
from ee_surgery.evaluation.record import record
from ee_surgery.files import atomic_write
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.tables import html
from ee_surgery.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_suffix(".html")
_STYLE = Path(__file__).with_name("page.css")
_SHOWN = 60  # operating points on the slider
_PICTURES = 8  # per exit
_SEARCHED = 2_000  # samples to find them in
_SIDE = 96  # pixels
_CLASSES = 30  # in one chart
_SWAPS = 5  # per exit
_BINS = 10


def report(
    branched: EarlyExitModel,
    path: str | os.PathLike[str],
    data: Data | None = None,
    *,
    bench: Bench | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 128,
    class_map: ClassMap | None = None,
) -> Path:
    """Write a report that opens in any browser, offline: one HTML file with all of its pictures.

    It has the frontier with a slider over its operating points, each exit alone, settings and receipt; with `data`,
    which classes leave where, where exits and original disagree, how far probabilities can be trusted, and pictures
    that leave at each exit, from the surest to the least sure; with `bench`, the latency.

    Args:
        path: of the file to write.
        data: held-out samples as for `record`, which can be read twice.
        bench: what `bench` measured of this model.
        class_names: to show; by default those that the model knows.
        batch_size: of recording.
        class_map: as for `record`.
    Raises:
        SurgeryError: matplotlib is not installed.
        DataError: as for `record`.
        WriteError: the file cannot be written.
    """
    instance("branched", branched, EarlyExitModel)
    optional(lambda name, value: instance(name, value, Bench))("bench", bench)
    if isinstance(data, Iterator):
        raise DataError("data is an iterator, which can be read only once: give a Dataset, a DataLoader or a list.")
    batch_size = count("batch_size", batch_size)
    state, frontier = branched.state, branched.state.frontier
    found: dict[str, Any] = {
        "model": visible(branched.engine.backbone.model_id),
        "exits": _exits(branched),
        "macs": branched.trunk_macs[-1],
        "untrained": branched.untrained,
        "receipt": str(branched.receipt()),
        "point": None if state.operating_point is None else str(state.operating_point),
        "training": _plain(state.provenance.get("training")),
        "effort": _plain(state.provenance.get("effort")),
        "bench": None if bench is None else Markup(html(bench.table())),
        "frontier": None if frontier is None else _frontier(frontier, state.operating_point),
        "learning": _learning(state.provenance),
        "data": None if data is None else _on_data(branched, data, class_names, batch_size, class_map),
    }
    page = render(_TEMPLATE, found)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def render(template: Path, found: Mapping[str, Any]) -> str:
    """A page of the template, all text escaped; `style` is that of all pages."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup(_STYLE.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(found, style=style)


def _exits(branched: EarlyExitModel) -> list[dict[str, Any]]:
    """Name, branch and costs of each exit."""
    whole = branched.trunk_macs[-1]
    each = zip(branched.exits, branched.specs, branched.trunk_macs, branched.branch_macs, strict=False)
    return [
        {"name": visible(name), "branch": visible(_branch(spec)), "trunk": trunk / whole, "branch_cost": macs / whole}
        for name, spec, trunk, macs in each
    ]


def _branch(spec: BranchSpec) -> str:
    options = (f"{name}={value}" for name, value in spec.options.items() if value != "")
    return " ".join([spec.name, *options, *(["with a confidence unit"] if spec.confidence else [])])


def _plain(settings: object) -> dict[str, str] | None:
    """Settings that fit on a line, by name."""
    if not isinstance(settings, Mapping):
        return None
    short = {name: value for name, value in settings.items() if isinstance(value, (str, int, float, bool))}
    return {visible(str(name), 100): visible(_rounded(value), 200) for name, value in short.items()}


def _rounded(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- charts


def _svg(figure: Figure) -> str:
    """As text, with names as text."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ee_surgery", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def _image(figure: Figure) -> str:
    """As the address of an image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(_svg(figure).encode()).decode()}"


def _frontier(frontier: Frontier, chosen: OperatingPoint | None) -> dict[str, Any]:
    """The chart with a mark per operating point, and what the slider shows of each."""
    points = list(frontier)
    kept = points[:: -(-len(points) // _SHOWN)]
    ends = [point for point in (points[-1], chosen) if point in points and point not in kept]
    kept = sorted([*kept, *ends], key=lambda point: point.macs_fraction)
    figure = blank_figure()
    axes = figure.subplots()
    draw_steps(axes, points, "early exit")
    axes.plot(1, frontier.base_accuracy * 100, "k*", markersize=12, label="original", zorder=4)
    alone = zip(frontier.exits[:-1], frontier.exit_macs, frontier.exit_accuracies, strict=False)
    each = [(visible(name, 60), macs, 100 * accuracy) for name, macs, accuracy in alone]
    axes.plot([m for _, m, _ in each], [a for *_, a in each], "o", color="tab:orange", label="each exit alone")
    for name, macs, accuracy in each:
        axes.annotate(name, (macs, accuracy), xytext=(5, -10), textcoords="offset points", fontsize=7, parse_math=False)
    for i, point in enumerate(kept):
        (mark,) = axes.plot(point.macs_fraction, point.expected_accuracy * 100, "D", color="tab:red", zorder=5)
        mark.set_gid(f"point-{i}")
    label_axes(axes, frontier.what)
    axes.legend(loc="lower right")
    shown = [
        {
            "accuracy": point.accuracy,
            "expected": point.expected_accuracy,
            "drop": frontier.base_accuracy - point.expected_accuracy,
            "macs": point.macs_fraction,
            "ms": point.latency_ms,
            "score": visible(str(point.score), 200),
            "shares": list(point.exit_shares),
        }
        for point in kept
    ]
    return {
        "svg": _svg(figure),
        "points": shown,
        "start": kept.index(chosen) if chosen in kept else 0,
        "what": frontier.what,
        "samples": points[0].samples,
        "exits": [visible(name) for name in frontier.exits],
        "alone": [
            {"name": visible(name), "macs": macs, "accuracy": accuracy, "auroc": auroc}
            for name, macs, accuracy, auroc in zip(
                frontier.exits,
                frontier.exit_macs,
                frontier.exit_accuracies,
                [*frontier.exit_aurocs, *[None] * len(frontier.exits)],
                strict=False,
            )
        ],
    }


def _learning(provenance: Mapping[str, Any]) -> str | None:
    """How loss and cost fell during training."""
    curves = {
        "loss": (provenance.get("training") or {}).get("losses"),
        "cost at the accepted drop, held out": (provenance.get("effort") or {}).get("cost_after_each_look"),
    }
    known = {name: values for name, values in curves.items() if _numbers(values)}
    if not known:
        return None
    figure = blank_figure()
    for number, (name, values) in enumerate(known.items(), start=1):
        axes = figure.add_subplot(1, len(known), number)
        axes.plot(range(1, len(values) + 1), values, "o-", markersize=3)
        axes.set(xlabel="epoch" if name == "loss" else "look", title=name)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    return _image(figure)


def _numbers(values: object) -> TypeGuard[Sequence[float]]:
    return isinstance(values, Sequence) and len(values) > 1 and all(isinstance(v, (int, float)) for v in values)


# --- on data


def _on_data(
    branched: EarlyExitModel,
    data: Data,
    class_names: Sequence[str] | None,
    batch_size: int,
    class_map: ClassMap | None,
) -> dict[str, Any]:
    records = record(branched, data, batch_size=batch_size, class_map=class_map)
    names = [visible(str(name), 60) for name in class_names or branched.engine.backbone.label_names or ()]
    one_class = records.logits is not None and records.task.chooses and records.target.ndim == 1
    point = branched.state.operating_point
    leaving = None
    if point is not None:
        leaving = records.replay(point.policy_for(records.task)).exit_index
    return {
        "samples": len(records),
        "table": Markup(html(records.table())),
        "classes": _by_class(records, leaving, names) if one_class and leaving is not None else None,
        "swaps": _swaps(records, names) if one_class else None,
        "reliability": _reliability(records) if one_class else None,
        "pictures": _pictures(branched, data, batch_size) if point is not None else None,
    }


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _by_class(records: ExitRecords, leaving: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Where the samples of each class leave, from the class that leaves earliest."""
    exits = [visible(name, 60) for name in (*records.exits, "original")]
    classes = records.target.unique().tolist()
    shares = {c: torch.bincount(leaving[records.target == c], minlength=len(exits)).double() for c in classes}
    shares = {c: row / row.sum() for c, row in shares.items()}
    macs = torch.tensor(records.exit_macs, dtype=torch.float64)
    order = sorted(classes, key=lambda c: float(shares[c] @ macs))
    shown = order if len(order) <= _CLASSES else [*order[: _CLASSES // 2], *order[-_CLASSES // 2 :]]
    figure = blank_figure()
    figure.set_size_inches(6.4, 1.2 + 0.22 * len(shown))
    axes = figure.subplots()
    left = torch.zeros(len(shown), dtype=torch.float64)
    rows = torch.stack([shares[c] for c in reversed(shown)])
    for k, name in enumerate(exits):
        axes.barh(range(len(shown)), rows[:, k].numpy(), left=left.numpy(), label=name)
        left += rows[:, k]
    axes.set_yticks(range(len(shown)), [_name(names, c) for c in reversed(shown)], fontsize=7, parse_math=False)
    axes.set(xlabel="share of the samples leaving at each exit", xlim=(0, 1))
    for text in axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7).get_texts():
        text.set(parse_math=False)
    return {"image": _image(figure), "shown": len(shown), "all": len(order)}


def _swaps(records: ExitRecords, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per exit, how often it answers otherwise than the original, and the most frequent such pairs."""
    answers = records.recorded_logits().argmax(-1)
    found = []
    for k, name in enumerate(records.exits):
        apart = answers[k] != answers[-1]
        pairs = Counter(zip(answers[-1][apart].tolist(), answers[k][apart].tolist(), strict=True))
        listed = [
            {"original": _name(names, a), "exit": _name(names, b), "count": n}
            for (a, b), n in pairs.most_common(_SWAPS)
        ]
        found.append({"name": visible(name), "share": apart.double().mean().item(), "pairs": listed})
    return found


def _reliability(records: ExitRecords) -> str:
    """Largest probability against accuracy, in bins of equal width."""
    figure = blank_figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "k:", linewidth=0.8)
    for k, name in enumerate((*records.exits, "original")):
        sure = records.recorded_logits()[k].softmax(-1).amax(-1)
        bins = (sure * _BINS).long().clamp(0, _BINS - 1)
        filled = bins.unique()
        at = [sure[bins == b].mean().item() for b in filled]
        right = [records.correct[k][bins == b].double().mean().item() for b in filled]
        axes.plot(at, right, "o-", markersize=3, label=visible(name, 60))
    axes.set(xlabel="largest probability", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    for text in axes.legend(loc="upper left", fontsize=7).get_texts():
        text.set(parse_math=False)
    return _image(figure)


def _pictures(branched: EarlyExitModel, data: Data, batch_size: int) -> list[dict[str, Any]] | None:
    """Per exit, some of the pictures that leave there, evenly from the surest to the least sure."""
    kept: dict[int, list[tuple[float, str]]] = {}
    device = next(branched.branches.parameters()).device
    seen = 0
    for inputs, _ in batches(data, batch_size):
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
            return None
        output = branched.predict(inputs.to(device))
        for row, (k, score) in enumerate(zip(output.exit_index.tolist(), output.score.tolist(), strict=True)):
            kept.setdefault(k, []).append((score, _png(inputs[row], branched.state.preprocessing)))
        seen += len(inputs)
        if seen >= _SEARCHED:
            break
    names = [*branched.exits, "original"]
    found = []
    for k, pictures in sorted(kept.items()):
        ordered = sorted(pictures, key=lambda each: -each[0]) if k < len(names) - 1 else pictures
        step = max(1, (len(ordered) - 1) / max(1, _PICTURES - 1))
        chosen = [ordered[min(len(ordered) - 1, round(i * step))] for i in range(min(_PICTURES, len(ordered)))]
        found.append({"name": visible(names[k]), "count": len(pictures), "pictures": [p for _, p in chosen]})
    return found


def _png(picture: Tensor, preprocessing: Mapping[str, Any] | None) -> str:
    """A picture (C, H, W) as the address of a small image, without the normalization of the model."""
    from torchvision.transforms.functional import to_pil_image

    shown = picture.detach().float().cpu()
    if preprocessing is not None:
        mean, std = (torch.tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        shown = shown * std + mean
    else:
        low, high = shown.amin(), shown.amax()
        shown = (shown - low) / (high - low).clamp(min=1e-6)
    image = to_pil_image(torch.nan_to_num(shown).clamp(0, 1))
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
