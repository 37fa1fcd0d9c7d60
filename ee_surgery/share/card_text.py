"""What a model card says, section by section: plain data to Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ee_surgery.backbone import Identity
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.share.probe import InputSpec


def found_by_name(base: Identity, own_base: bool) -> bool:
    """Whether `from_pretrained` can make the base from its name, as far as that is known without asking the Hub."""
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
    # Another number of classes is a head of its own: fine-tuned, so not the published weights.
    return bool(published.has_weights) and base.num_classes in (0, published.num_classes)


def pipeline_tag(config: AdapterConfig) -> str | None:
    """What the Hub calls the task, as far as the inputs tell."""
    main = next(iter(config.inputs.values()))
    if config.base.library == "timm" or "Image" in config.base.architecture or len(main.shape) == 4:
        return "image-classification"
    return "text-classification" if len(main.shape) == 2 and main.dtype.startswith("int") else None


def _base_name(base: Identity) -> str:
    """Its name for the reader; no path of the machine that it was made on."""
    return base.hub_id or (base.architecture if os.path.isabs(base.model_id) else base.model_id)


def summary(config: AdapterConfig) -> str:
    """One paragraph on what it is."""
    kinds = ", ".join(dict.fromkeys(f"`{exit.branch.name}`" for exit in config.exits))
    count = len(config.exits)
    what = f"{count} branches" if count > 1 else "One branch"
    base = (
        "The base was trained along with them and is stored here."
        if config.own_base
        else "The base's own weights are not changed, and not stored here."
    )
    return (
        f"{what} ({kinds}) on `{_base_name(config.base)}`, made with ee_surgery: an input that a branch is sure about "
        f"leaves the network there, and the rest runs on. {base}"
    )


def snippet(config: AdapterConfig, frontier: Frontier | None, where: str) -> str:
    """Code that works as pasted; where nobody can make the base by a name, as soon as `model` is the base."""
    loading = f"branched = ee_surgery.from_pretrained({json.dumps(where)})"
    lines = ["import torch", "", "import ee_surgery", ""]
    if not found_by_name(config.base, config.own_base):
        what = config.base.architecture or config.base.model_id
        which = "its weights are stored here" if config.own_base else "with the weights of the fingerprint below"
        lines.append(f"# `model` is the base: a {what} that you have made, {which}.")
        loading = f"{loading[:-1]}, model=model)"
    lines.append(loading)
    knob = "branched.operate(max_accuracy_drop=0.01)"
    if frontier is not None and config.operating_point is None:
        lines.append(f"{knob}  # when to leave: a knob that you can move at any time")
    elif frontier is not None:
        lines.append(f"# {knob}  # another trade-off, at any time")
    first, *others = config.inputs
    if others or config.options:
        lines.append("inputs = {  # yours, prepared as for the base")
        lines += [f'    "{name}": {_random(spec)},' for name, spec in config.inputs.items()]
        lines += [f'    "{name}": {value!r},' for name, value in config.options.items()]
        lines += ["}", "output = branched.predict(**inputs)"]
    else:
        lines.append(f"inputs = {_random(config.inputs[first])}  # yours, prepared as for the base")
        lines.append("output = branched.predict(inputs)")
    lines.append("print(output.logits.argmax(-1), output.exit_index, output.macs_fraction)")
    return "\n".join(lines)


def _random(spec: InputSpec) -> str:
    """Code that makes what `InputSpec.make` makes."""
    shape, kind = tuple(spec.shape), f"dtype=torch.{spec.dtype}"
    if spec.dtype.startswith(("float", "bfloat")):
        return f"torch.randn({shape}{'' if spec.dtype == 'float32' else f', {kind}'})"
    lowest = min(1, spec.highest)
    if lowest == spec.highest:
        return f"torch.full({shape}, {lowest}, {kind})"
    return f"torch.randint({lowest}, {spec.highest + 1}, {shape}, {kind})"


def usage(config: AdapterConfig, frontier: Frontier | None, where: str, processor: bool) -> str:
    """How inputs are prepared, what comes back, and when samples leave; `processor`: whether one is saved along."""
    lines, pictures = [], pipeline_tag(config) == "image-classification"
    if pictures and (processor or config.preprocessing is not None):
        lines.append("`branched.transform()` makes such inputs of PIL pictures.")
        if found_by_name(config.base, config.own_base):
            pipe = f'transformers.pipeline("image-classification", model={json.dumps(where)})'
            lines.append(f"With `ee_surgery` imported, `{pipe}` loads it too.")
    elif config.base.library == "transformers" and config.base.hub_id:
        cls, what = ("AutoImageProcessor", "pictures") if pictures else ("AutoTokenizer", "texts")
        lines.append(f'`transformers.{cls}.from_pretrained("{config.base.hub_id}")` prepares {what} for this base.')
    lines.append("`branched(inputs)` answers with what the base answers with.")
    if config.operating_point is not None:
        when = "Inputs leave early as the operating point below says; `branched.operate(None)` runs the whole original."
    elif frontier is not None:
        when = "Nothing leaves early until `operate` picks a trade-off."
    else:
        when = (
            "Nothing leaves early yet: `ee_surgery.calibrate(branched, held_out)` finds thresholds on data of yours, "
            "and `branched.operate(...)` picks some."
        )
    return " ".join([*lines, when])


def measured(found: Mapping[str, Any], data: str) -> dict[str, str]:
    """What `evaluate` found, on data of that name."""
    kind = accuracy_name(found["labelled"])
    text = (
        f"By running it as it is stored here, on {found['samples']} samples ({_cell(data)}): {kind} "
        f"**{found['accuracy']:.2%}** at **{found['macs_fraction']:.2%}** of the original's mean MACs, branches "
        "included."
    )
    if found["labelled"]:
        text += (
            f" The original has {found['original_accuracy']:.2%} on them; {found['agreement']:.2%} get the class that "
            "it gives them."
        )
    rows = [
        [f"`{name}`", f"{share:.2%}", "" if accuracy is None else f"{accuracy:.2%}"]
        for name, share, accuracy in zip(found["exits"], found["exit_shares"], found["exit_accuracies"], strict=True)
    ]
    return {"text": text, "table": _table(["exit", "samples that left there", f"their {kind}"], rows)}


def trade_offs(frontier: Frontier) -> dict[str, str]:
    """The points at some round accuracy drops."""
    what = accuracy_name(frontier.labelled)
    original = f" (the original: {frontier.base_accuracy:.2%})" if frontier.labelled else ""
    text = (
        f"Found on {frontier.points[0].samples} held-out calibration samples{original}. Rows: the points at some round "
        f"drops, of {len(frontier)} in all. Expected: on new data of the same kind, the luck in choosing thresholds "
        "taken off. MACs: mean of a sample, branches included, by the original's."
    )
    rows = [
        [f"{p.accuracy:.2%}", _number(p.expected_accuracy, ".2%"), f"{p.macs_fraction:.2%}", f"`{p.score}`",
         *(f"{share:.2%}" for share in p.exit_shares)]
        for p in frontier.milestones()
    ]  # fmt: skip
    head = [what, "expected", "MACs", "score", *(f"leave at `{name}`" for name in frontier.exits)]
    return {"text": text, "table": _table(head, rows)}


def exits(config: AdapterConfig, frontier: Frontier | None) -> dict[str, str]:
    """What each exit reads and costs, and how often it is right alone."""
    head = ["exit", "features", "branch", "MACs of the base up to it", "MACs of its branch"]
    rows = [
        [f"`{e.name}`", "x".join(map(str, e.shape)), f"`{e.branch.name}`", f"{e.trunk_macs / config.base_macs:.2%}",
         f"{e.branch_macs:,}"]
        for e in config.exits
    ]  # fmt: skip
    rows.append(["`original`", "", "its own" if config.head_classes is None else "a new head", "100.00%", ""])
    text = f"The original takes {config.base_macs:,} MACs a sample."
    if frontier is not None:
        head.append(f"{accuracy_name(frontier.labelled)} alone, on the calibration samples")
        for row, accuracy in zip(rows, frontier.exit_accuracies, strict=True):
            row.append(f"{accuracy:.2%}")
    return {"text": text, "table": _table(head, rows)}


def operating_point(point: OperatingPoint | None, frontier: Frontier | None) -> dict[str, str | None]:
    """The point that is stored, and what is known of it."""
    if point is None or point.policy.closed:
        return {"text": "None is stored: nothing leaves early until one is picked.", "table": None}
    known = {
        "score": f"`{point.score}`",
        "thresholds": ", ".join("closed" if t == float("inf") else f"{t:.6g}" for t in point.thresholds),
        "who never left gets the answer of": {"last": "the last exit", "most_confident": "the most confident exit"}[
            point.fallback
        ],
        accuracy_name(frontier is None or frontier.labelled): _number(point.accuracy, ".2%"),
        "expected on new data": _number(point.expected_accuracy, ".2%"),
        "drop from the original, points": _number(100 * point.accuracy_drop, ".2f"),
        "mean MACs by the original's": _number(point.macs_fraction, ".2%"),
        "leave at each exit, the original last": ", ".join(f"{share:.2%}" for share in point.exit_shares),
    }
    chosen = f"on {point.samples} calibration samples, which the numbers are of" if point.samples else ""
    text = f"An input leaves at the first exit whose score reaches its threshold. Chosen by `{point.rule}` {chosen}"
    certificate = None if point.certificate is None else _cell(str(point.certificate))
    rows = [[name, value] for name, value in known.items() if value]
    return {"text": f"{text.rstrip()}.", "table": _table(["", ""], rows), "certificate": certificate}


def settings(training: object) -> str | None:
    """Whatever training wrote down, a line each."""
    if not isinstance(training, Mapping) or not training:
        return None
    return _table(["setting", "value"], [[_cell(str(n)), _plain(v)] for n, v in training.items() if v is not None])


def original(config: AdapterConfig, receipt: str | None) -> str:
    """Who the base is, and that it was not touched."""
    base = config.base
    lines = [f"`{_cell(_base_name(base))}` of {base.library}, {base.num_classes or 'no'} classes"]
    if base.revision:
        lines[0] += f", revision `{base.revision}`"
    lines[0] += f"; fingerprint (SHA-256 of all parameters and buffers) `{base.fingerprint}`."
    if receipt is not None:
        lines.append(f"Receipt when this was saved: {_cell(receipt)}.")
    lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in config.versions.items()) + ".")
    return "\n\n".join(lines)


def limits(config: AdapterConfig, frontier: Frontier | None) -> list[str]:
    """What not to expect, a sentence or two each."""
    lines = ["The base must be the one of this fingerprint: another one is refused."]
    if config.own_base:
        lines = ["The base is stored here because it was trained along: it is not the published one."]
    other = config.provenance.get("other_base")
    if isinstance(other, Mapping):
        lines.append(
            f"The branches were trained on a base with fingerprint `{_plain(other.get('trained_on'))}` and then put on "
            "this one: what was calibrated before that does not hold."
        )
    point = frontier.points[0] if frontier is not None else config.operating_point
    if point is not None and point.samples:
        lines.append(
            f"Thresholds were chosen on {point.samples} samples. On data of another kind, accuracy and cost are "
            "others: calibrate again on data of yours."
        )
    if frontier is not None and not frontier.labelled:
        lines.append("The calibration samples had no labels: the original's own answers stood for them.")
    lines.append(
        "MACs are no time: what is gained depends on device and batch size. Measure it with `ee-surgery bench`."
    )
    return lines


# --- small parts


def accuracy_name(labelled: bool) -> str:
    """What a share of right answers is called: without labels, the original's answers stood for them."""
    return "accuracy" if labelled else "agreement with the original"


def _number(value: float, form: str) -> str:
    """A number, or nothing for one that is not known (NaN)."""
    return format(value, form) if value == value else ""


def _cell(text: str) -> str:
    """Text that stays in its table cell and cannot be markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell(str(name))} {_plain(v)}" for name, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return _cell(value if isinstance(value, str) else json.dumps(value, default=str))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
