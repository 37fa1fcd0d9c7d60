"""The text of a model card, section by section: plain data to Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ee_surgery.backbone.base import Identity
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.errors import AdapterError
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.share.probe import InputSpec
from ee_surgery.share.provenance import CALIBRATION, EVALUATION, LOADED_FROM, STATED_BY, TRAINING, stated_by
from ee_surgery.task import CLASSIFICATION, TASKS, Task
from ee_surgery.text import cell, code, markdown, visible

_SETTINGS = 100  # how many are shown
_AGAIN = {CALIBRATION: "calibrated", EVALUATION: "measured", TRAINING: "trained"}


def found_by_name(base: Identity, own_base: bool) -> bool:
    """Whether `from_pretrained` can load the base by its name, as far as is known without asking the Hub."""
    if base.adapters:
        return False  # only peft can load it
    if base.library != "timm":
        return base.library == "transformers" and base.hub_id is not None
    if own_base:
        return True  # the architecture is enough
    import timm

    try:
        published = timm.get_pretrained_cfg(base.model_id)
    except RuntimeError:  # a tag that this timm does not know
        published = None
    if published is None:
        return base.hub_id is not None
    # A different number of classes means a new head: fine-tuned, so not the published weights.
    return bool(published.has_weights) and base.num_classes in (0, published.num_classes)


def pipeline_tag(config: AdapterConfig) -> str | None:
    """The Hub's name of the task, inferred from the inputs."""
    kind, tags = inputs_kind(config), task_of(config).hub_tags
    return None if kind is None else tags.get(kind)


def inputs_kind(config: AdapterConfig) -> str | None:
    """`image` or `text`, inferred from the inputs."""
    main = next(iter(config.inputs.values()))
    if config.base.library == "timm" or "Image" in config.base.architecture or len(main.shape) == 4:
        return "image"
    return "text" if len(main.shape) == 2 and main.dtype.startswith("int") else None


def task_of(config: AdapterConfig) -> Task:
    """What the base answers; one right class where its task is not known here."""
    return TASKS.get(config.task, CLASSIFICATION)


def _base_name(base: Identity) -> str:
    """Its name for the reader, never a local path."""
    return base.hub_id or (base.architecture if os.path.isabs(base.model_id) else base.model_id)


def summary(config: AdapterConfig) -> str:
    """One paragraph: what this adapter is."""
    kinds = ", ".join(dict.fromkeys(code(exit.branch.name) for exit in config.exits))
    count = len(config.exits)
    what = f"{count} branches" if count > 1 else "One branch"
    base = (
        "The base was trained together with them and is stored here."
        if config.own_base
        else "The base's own weights are unchanged and not stored here."
    )
    name = code(_base_name(config.base))
    return (
        f"{what} ({kinds}) on {name}, made with ee_surgery: an input leaves the network at the first branch that is "
        f"confident enough; the others run through the whole network. {base}"
    )


def snippet(config: AdapterConfig, frontier: Frontier | None, where: str) -> str:
    """Code that works as pasted; if the base cannot be loaded by name, once `model` is the base."""
    loading = f"branched = ee_surgery.from_pretrained({_literal(where)})"
    lines = ["import torch", "", "import ee_surgery", ""]
    if not found_by_name(config.base, config.own_base):
        what = config.base.architecture or config.base.model_id
        what += f" with the PEFT adapters {config.base.adapters}" if config.base.adapters else ""
        what = visible(what).replace("`", "'")
        which = "its weights are stored here" if config.own_base else "with the weights of the fingerprint below"
        lines.append(f"# `model` is the base: a {what} that you create yourself, {which}.")
        loading = f"{loading[:-1]}, model=model)"
    lines.append(loading)
    knob = "branched.operate(max_accuracy_drop=0.01)"
    if frontier is not None and config.operating_point is None:
        lines.append(f"{knob}  # when samples leave; can be changed at any time")
    elif frontier is not None:
        lines.append(f"# {knob}  # a different trade-off, at any time")
    first, *others = config.inputs
    if others or config.options:
        lines.append("inputs = {  # your own, preprocessed as for the base")
        lines += [f"    {_literal(name)}: {_random(spec)}," for name, spec in config.inputs.items()]
        lines += [f"    {_literal(name)}: {_literal(value)}," for name, value in config.options.items()]
        lines += ["}", "output = branched.predict(**inputs)"]
    else:
        lines.append(f"inputs = {_random(config.inputs[first])}  # your own, preprocessed as for the base")
        lines.append("output = branched.predict(inputs)")
    lines.append(f"print({task_of(config).decided}, output.exit_index, output.macs_fraction)")
    return "\n".join(lines)


def _literal(value: object) -> str:
    """Plain data as one line of Python code for display: nothing hidden in it, and no end of the code block."""
    text = repr(value)
    if isinstance(value, str) and '"' not in text:
        text = f'"{text[1:-1]}"'
    return visible(text, 10 * len(text)).replace("`", "\\x60")


def _random(spec: InputSpec) -> str:
    """Code that creates the same input as `InputSpec.make`."""
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):  # it becomes code
        raise AdapterError(f"An input of the adapter is of dtype {spec.dtype!r}, which torch does not have.")
    shape, kind, highest = tuple(map(int, spec.shape)), f"dtype={dtype}", int(spec.highest)
    if dtype.is_floating_point:
        return f"torch.randn({shape}{'' if dtype is torch.float32 else f', {kind}'})"
    lowest = min(1, highest)
    if lowest == highest:
        return f"torch.full({shape}, {lowest}, {kind})"
    return f"torch.randint({lowest}, {highest + 1}, {shape}, {kind})"


def usage(config: AdapterConfig, frontier: Frontier | None, where: str, processor: bool) -> str:
    """How to preprocess inputs, what is returned, and when samples leave; `processor`: whether one is saved too."""
    lines, pictures = [], inputs_kind(config) == "image"
    if pictures and (processor or config.preprocessing is not None):
        lines.append("`branched.transform()` preprocesses PIL images.")
        if found_by_name(config.base, config.own_base):
            pipe = f"transformers.pipeline({_literal(pipeline_tag(config))}, model={_literal(where)})"
            lines.append(f"With `ee_surgery` imported, {code(pipe)} loads it too.")
    elif config.base.library == "transformers" and config.base.hub_id:
        cls, what = ("AutoImageProcessor", "images") if pictures else ("AutoTokenizer", "texts")
        call = f"transformers.{cls}.from_pretrained({_literal(config.base.hub_id)})"
        lines.append(f"{code(call)} preprocesses {what} for this base.")
    lines.append("`branched(inputs)` returns the same type of output as the base.")
    if config.operating_point is not None:
        when = "Inputs leave early by the operating point below; `branched.operate(None)` runs the whole original."
    elif frontier is not None:
        when = "No input leaves early until `operate` picks a trade-off."
    else:
        when = (
            "No input leaves early yet: `ee_surgery.calibrate(branched, held_out)` finds thresholds on your own data, "
            "and `branched.operate(...)` picks a trade-off."
        )
    return " ".join([*lines, when])


def measured(found: Mapping[str, Any], data: str, task: Task) -> dict[str, str]:
    """Results of `evaluate`; `data`: the data set, in Markdown."""
    kind = accuracy_name(found["labelled"], task.measure)
    text = (
        f"Measured by running it as stored here, on {found['samples']} samples ({data}): {kind} "
        f"**{found['accuracy']:.2%}** at **{found['macs_fraction']:.2%}** of the original's mean MACs, branches "
        "included."
    )
    if found["labelled"]:
        text += (
            f" The original has {found['original_accuracy']:.2%}; {found['agreement']:.2%} of the samples get its "
            "prediction."
        )
        more = found.get("measures", {})
        for name in (name for name in task.measures if more.keys() >= {name, f"original_{name}"}):
            routed, original = more[name], more[f"original_{name}"]
            text += f" {name.replace('_', ' ').capitalize()}: {routed:.4g}, of the original {original:.4g}."
    rows = [
        [code(name), f"{share:.2%}", "" if accuracy is None else f"{accuracy:.2%}"]
        for name, share, accuracy in zip(found["exits"], found["exit_shares"], found["exit_accuracies"], strict=True)
    ]
    return {"text": text, "table": _table(["exit", "share of samples", f"their {kind}"], rows)}


def trade_offs(frontier: Frontier, plot: str | None) -> dict[str, str | None]:
    """The points at some round accuracy drops, and the plot."""
    what = accuracy_name(frontier.labelled, frontier.measure)
    original = f" (the original: {frontier.base_accuracy:.2%})" if frontier.labelled else ""
    text = (
        f"Calibrated on {frontier.points[0].samples} held-out samples{original}. Rows: the points at some round "
        f"accuracy drops, out of {len(frontier)}. Expected: on new data of the same kind, corrected for selection bias "
        "by cross-validation. MACs: mean per sample, including every branch visited, as a fraction of the original's."
    )
    rows = [
        [f"{p.accuracy:.2%}", _number(p.expected_accuracy, ".2%"), f"{p.macs_fraction:.2%}", code(p.score),
         *(f"{share:.2%}" for share in p.exit_shares)]
        for p in frontier.milestones()
    ]  # fmt: skip
    head = [what, "expected", "MACs", "score", *(f"leaving at {code(name)}" for name in frontier.exits)]
    return {"text": text, "table": _table(head, rows), "plot": plot}


def exits(config: AdapterConfig, frontier: Frontier | None) -> dict[str, str]:
    """Features and cost of each exit, and its accuracy alone."""
    head = ["exit", "features", "branch", "MACs of the base up to it", "MACs of its branch"]
    rows = [
        [code(e.name), "x".join(map(str, e.shape)), code(e.branch.name), f"{e.trunk_macs / config.base_macs:.2%}",
         f"{e.branch_macs:,}"]
        for e in config.exits
    ]  # fmt: skip
    rows.append(["`original`", "", "its own" if config.head_classes is None else "a new head", "100.00%", ""])
    text = f"The original takes {config.base_macs:,} MACs per sample."
    if frontier is not None:
        head.append(f"{accuracy_name(frontier.labelled, frontier.measure)} alone, on the calibration samples")
        for row, accuracy in zip(rows, frontier.exit_accuracies, strict=True):
            row.append(f"{accuracy:.2%}")
        if frontier.exit_aurocs:
            head.append("AUROC of its score, right against wrong answers")
            for row, auroc in zip(rows, [*frontier.exit_aurocs, None], strict=True):
                row.append("" if auroc is None else f"{auroc:.3f}")
    return {"text": text, "table": _table(head, rows)}


def operating_point(point: OperatingPoint | None, frontier: Frontier | None) -> dict[str, str | None]:
    """The stored operating point and its evidence."""
    if point is None or point.policy.closed:
        return {"text": "None is stored: no input leaves early until one is picked.", "table": None}
    known = {
        "score": code(point.score),
        "thresholds": ", ".join("closed" if t == float("inf") else f"{t:.6g}" for t in point.thresholds),
        "fallback for samples that never exit early": {
            "last": "the last exit",
            "most_confident": "the most confident exit",
        }[point.fallback],
        "accuracy" if frontier is None else accuracy_name(frontier.labelled, frontier.measure): _number(
            point.accuracy, ".2%"
        ),
        "expected on new data": _number(point.expected_accuracy, ".2%"),
        "drop below the original, points": _number(100 * point.accuracy_drop, ".2f"),
        "mean MACs, fraction of the original's": _number(point.macs_fraction, ".2%"),
        "share leaving at each exit, the original last": ", ".join(f"{share:.2%}" for share in point.exit_shares),
    }
    chosen = f"on {point.samples} calibration samples, on which these numbers were measured" if point.samples else ""
    text = f"An input leaves at the first exit whose score reaches its threshold. Rule: {code(point.rule)} {chosen}"
    certificate = None if point.certificate is None else markdown(point.certificate)
    rows = [[name, value] for name, value in known.items() if value]
    return {"text": f"{text.rstrip()}.", "table": _table(["", ""], rows), "certificate": certificate}


def settings(training: object) -> str | None:
    """The recorded training settings, one per line."""
    if not isinstance(training, Mapping):
        return None
    rows = [[markdown(n), _value(v)] for n, v in training.items() if v is not None and n != STATED_BY]
    return _table(["setting", "value"], rows[:_SETTINGS]) if rows else None


def search(provenance: Mapping[str, Any]) -> dict[str, str | None] | None:
    """How exits were found and how long branches were trained: what was tried, what came of it and why."""
    effort, found = settings(provenance.get("effort")), provenance.get("placement")
    found = found if isinstance(found, Mapping) else {}
    given = found.get("candidates"), found.get("left_out")
    candidates, left_out = (each if isinstance(each, list) else [] for each in given)
    rows = [row for each in candidates[:_SETTINGS] if (row := _tried(each, left_out)) is not None]
    if not rows and effort is None:
        return None
    head = ["exit", "branch", "accuracy of a short training alone", "cost of leaving there", ""]
    return {"effort": effort, "table": _table(head, rows) if rows else None}


def _tried(candidate: object, left_out: Sequence[object]) -> list[str] | None:
    """A row about one candidate; None if it is damaged."""
    if not isinstance(candidate, Mapping):
        return None
    name, options = candidate.get("exit"), candidate.get("options")
    numbers = [candidate.get(key) for key in ("accuracy", "cost")]
    if not isinstance(name, str) or not all(isinstance(number, float) for number in numbers):
        return None
    end = "left out after training: costs more than it saves" if name in left_out else "trained"
    branch = f"{candidate.get('branch')} {_plain_options(options)}".strip()
    shown = [f"{number:.1%}" for number in numbers]
    return [code(name), code(branch), *shown, end if candidate.get("chosen") is True else "not chosen"]


def _plain_options(options: object) -> str:
    """Options of a branch in a few words."""
    if not isinstance(options, Mapping):
        return ""
    return " ".join(f"{name}={value}" for name, value in options.items() if value not in ("", None))


def statement(provenance: Mapping[str, Any], part: str) -> str | None:
    """Who stated a part of the provenance, if it was loaded and not redone."""
    found = provenance.get(part)
    name, source = stated_by(found), provenance.get(LOADED_FROM)
    if name is None:
        return None
    how = f", and loaded from {markdown(source)}" if isinstance(source, str) and source != name else ""
    return f"Stated by {markdown(name)}{how}; not {_AGAIN[part]} again since."


def original(config: AdapterConfig, receipt: str | None) -> str:
    """Which model the base is, and that it is unchanged."""
    base = config.base
    lines = [f"{code(_base_name(base))} of {markdown(base.library)}, {base.num_classes or 'no'} classes"]
    if base.revision:
        lines[0] += f", revision {code(base.revision)}"
    lines[0] += f"; fingerprint (SHA-256 of all parameters and buffers) {code(base.fingerprint)}."
    if receipt is not None:
        lines.append(f"Receipt when this was saved: {markdown(receipt)}.")
    versions = [f"{markdown(name)} {markdown(value)}" for name, value in config.versions.items()]
    lines.append(f"Versions: {', '.join(versions[:_SETTINGS])}.")
    return "\n\n".join(lines)


def limits(config: AdapterConfig, frontier: Frontier | None) -> list[str]:
    """Limitations, a sentence or two each."""
    lines = ["The base must have this fingerprint; any other is refused."]
    if config.own_base:
        lines = [
            "The base is stored here because it was trained together with the branches: it is not the published one."
        ]
    other = config.provenance.get("other_base")
    if isinstance(other, Mapping):
        lines.append(
            f"The branches were trained on a base with fingerprint {code(other.get('trained_on'))} and then put on "
            "this one: earlier calibration results do not hold."
        )
    untrained = config.provenance.get("untrained")
    if isinstance(untrained, Sequence) and not isinstance(untrained, str) and untrained:
        lines.append(f"Untrained, so that samples must not leave there: {', '.join(map(code, untrained))}.")
    point = frontier.points[0] if frontier is not None else config.operating_point
    if point is not None and point.samples:
        lines.append(
            f"Thresholds were chosen on {point.samples} samples. On other data, accuracy and cost will differ: "
            "calibrate again on your own."
        )
    if frontier is not None and not frontier.labelled:
        lines.append("The calibration samples had no labels: accuracy means agreement with the original.")
    lines.append(
        "MACs are not latency: the speed-up depends on device and batch size. Measure it with `ee-surgery bench`."
    )
    return lines


# --- small parts


def accuracy_name(labelled: bool, measure: str = CLASSIFICATION.measure) -> str:
    """The name of the measure: without labels, it is agreement with the original."""
    return measure if labelled else "agreement with the original"


def _number(value: float, form: str) -> str:
    """A number, or nothing if it is unknown (NaN)."""
    return format(value, form) if value == value else ""


def _value(value: object) -> str:
    """A setting as Markdown; numbers and simple words as they are."""
    if isinstance(value, Mapping) and not any(isinstance(v, (Mapping, list, tuple)) for v in value.values()):
        parts = [f"{name} {_number_or_word(v)}" for name, v in value.items() if v is not None]
        return markdown(", ".join(parts))
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (Mapping, list, tuple)) for v in value):
        return markdown(", ".join(map(_number_or_word, value)))
    return markdown(_number_or_word(value))


def _number_or_word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown that stays in its cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
