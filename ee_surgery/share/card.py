"""The model card: what an adapter folder says of itself, as the README that the Hub shows.

    README.md                       front matter for the Hub, usage, tables
    assets/frontier.png             where there is a frontier, and matplotlib
    .eval_results/ee_surgery.yaml   where the measured accuracy is that of a benchmark on the Hub

A function of the folder's plain data: every number comes from `config.json` or `frontier.json`, and what was not
measured is not there.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.errors import ConfigError, SurgeryWarning
from ee_surgery.files import FolderChange, read_bytes
from ee_surgery.policies.operating_point import describe
from ee_surgery.registry import suggest
from ee_surgery.share import card_text as text
from ee_surgery.share.adapter import CARD, PLOT, PROCESSOR, RESULTS, AdapterConfig, change_adapter, load_adapter
from ee_surgery.share.provenance import CALIBRATION, EVALUATION, TRAINING, stated_by
from ee_surgery.task import CLASSIFICATION, Task
from ee_surgery.text import LINE, markdown, visible

_LARGEST = 4 << 20  # bytes of a card
MARKER = (
    "<!-- Written by ee_surgery, and written anew with every save: delete this line to keep a card of your own. -->"
)
_TEMPLATE = Path(__file__).with_suffix(".md")
_EVALUATION = {"accuracy", "original_accuracy", "agreement", "macs_fraction", "samples", "labelled", "operating_point",
               "exits", "exit_shares", "exit_accuracies"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """Optional information for a card beyond the folder's own data."""

    license: str | None = None
    """License of the branches, as the Hub writes it: `apache-2.0`."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the data sets that the branches were trained on."""
    language: tuple[str, ...] = ()
    """Languages of the texts: `en`."""
    tags: tuple[str, ...] = ()
    """Additional tags."""
    pipeline_tag: str | None = None
    """Overrides the one inferred from the inputs."""
    repo_id: str | None = None
    """Its Hub repository; without it, the snippet names the local folder."""
    eval_dataset: str | None = None
    """Hub id of the evaluation data."""
    eval_name: str | None = None
    """Display name of the evaluation data."""
    eval_split: str | None = None
    """`test`, `validation`, ..."""
    eval_task: str | None = None
    """Task of the Hub benchmark `eval_dataset`: the accuracy is offered to its leaderboard."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> CardInfo:
        """Check keywords; a single word becomes a list of one, and None is ignored.

        Raises:
            ConfigError: an unknown keyword, a value that is not text, or an invalid repository name.
        """
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"A model card has no field {name!r}. {suggest(name, known)} All: {', '.join(known)}."
                )
            if value is None:
                continue
            several = isinstance(known[name].default, tuple)
            words = tuple(value) if several and isinstance(value, (list, tuple)) else (value,)
            if not all(isinstance(word, str) and word.strip() and visible(word) == word for word in words):
                raise ConfigError(
                    f"{name} of a model card must be text{' or a list of it' * several}, got {visible(repr(value))}. "
                    f"Each is one line of at most {LINE} visible characters."
                )
            if name in ("datasets", "repo_id", "eval_dataset"):
                for word in words:
                    _check_id(name, word)
            values[name] = words if several else value
        info = cls(**values)
        if info.eval_task and not info.eval_dataset:
            raise ConfigError(
                f"eval_task={info.eval_task!r} is the task of a benchmark: also give its name, eval_dataset=."
            )
        return info

    @classmethod
    def stored(cls, config: AdapterConfig, given: Mapping[str, Any]) -> CardInfo:
        """Fields of an earlier card of this adapter, overridden by those given now."""
        earlier = config.provenance.get("card")
        kept: dict[str, Any] = {}
        for field in fields(cls):
            if isinstance(earlier, Mapping) and field.name in earlier:
                kept = cls._with_stored(kept, field.name, earlier[field.name])
        return cls.of({**kept, **given})

    @classmethod
    def _with_stored(cls, kept: dict[str, Any], name: str, value: object) -> dict[str, Any]:
        """Add a stored field if it is valid: fields written by others must not prevent a card from being written."""
        try:
            return cls.of({**kept, name: value}).to_dict()
        except ConfigError as error:
            warnings.warn(f"A field of the earlier card is left out: {error}", SurgeryWarning, stacklevel=4)
            return kept

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v}


def write_card(
    folder: Path, config: AdapterConfig, frontier: Frontier | None, receipt: str | None = None, **about: Any
) -> Path:
    """Write the card of an adapter folder with its plot and results; all of it or, on an error, nothing.

    A README that this package did not write is kept, with a warning; plot and results are written next to it.

    Args:
        receipt: text of `branched.receipt()`; left out of the card when None.
        about: fields of `CardInfo`; those of an earlier card are kept.
    Raises:
        ConfigError: see `CardInfo.of`.
        AdapterError: the folder cannot be written.
    """
    info = CardInfo.stored(config, about)
    with change_adapter(folder) as change:
        save_card(change, config, frontier, receipt, info)
    return folder / CARD


def save_card(
    change: FolderChange, config: AdapterConfig, frontier: Frontier | None, receipt: str | None, info: CardInfo
) -> None:
    """`write_card`, as part of a change of the folder."""
    path = change.folder / CARD
    foreign = _is_foreign(path)
    measured = _measured(config)
    for name in (PLOT, RESULTS):  # of an earlier card
        change.kept.pop(name, None)
        change.stray.add(name)
    if frontier is not None and importlib.util.find_spec("matplotlib") is not None:
        frontier.plot().savefig(change.place(PLOT), dpi=150, format="png")
    if entries := _leaderboard(info, None if stated_by(measured) else measured, text.task_of(config)):
        results = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        change.place(RESULTS).write_text(results, encoding="utf-8")
    if foreign:
        change.kept.pop(CARD, None)
        warnings.warn(
            f"{path} was not written by ee_surgery and is kept. Delete it to get a model card.",
            SurgeryWarning,
            stacklevel=3,
        )
    else:
        content = _render(change, config, frontier, receipt, info, measured, plot=change.wrote(PLOT))
        change.place(CARD).write_text(content, encoding="utf-8")


def _is_foreign(path: Path) -> bool:
    """Whether there is a file that this package did not write."""
    try:
        return MARKER.encode() not in read_bytes(path, _LARGEST)
    except FileNotFoundError:
        return False
    except OSError:  # not a regular file, or larger than any card
        return True


def update_card(folder: Path, **about: Any) -> Path:
    """Rewrite the card of a saved folder from the folder alone; the base is not needed.

    `about` is stored in the folder's `config.json`; the receipt is the one from when the folder was saved.

    Raises:
        AdapterError: the folder is not an adapter, is damaged or cannot be written.
        ConfigError: see `CardInfo.of`.
    """
    config, _, frontier = load_adapter(folder)
    info = CardInfo.stored(config, about)
    config = replace(config, provenance={**config.provenance, "card": info.to_dict()} if about else config.provenance)
    receipt = config.provenance.get("receipt")
    with change_adapter(folder) as change:
        change.data = {**change.data, "provenance": config.provenance}
        save_card(change, config, frontier, receipt if isinstance(receipt, str) else None, info)
    return folder / CARD


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_id(name: str, given: str) -> None:
    try:
        validate_repo_id(given)
    except HFValidationError as error:
        raise ConfigError(f"{name} of a model card: {given!r} is not a valid Hub id. {error}") from error


# --- what is known


def _measured(config: AdapterConfig) -> dict[str, Any] | None:
    """Results of `evaluate` at the stored operating point; None if there are none."""
    found = config.provenance.get(EVALUATION)
    if not isinstance(found, Mapping) or not found.keys() >= _EVALUATION:
        return None
    if not _well_formed(found):
        warnings.warn(
            "The stored evaluation is damaged and is left out of the card. Run ee.evaluate again.",
            SurgeryWarning,
            stacklevel=4,
        )
        return None
    if found["operating_point"] != describe(config.operating_point):
        warnings.warn(
            "The evaluation was made at a different operating point from the stored one, and is left out of the card. "
            "Run ee.evaluate again.",
            SurgeryWarning,
            stacklevel=4,
        )
        return None
    return dict(found)


def _well_formed(found: Mapping[str, Any]) -> bool:
    """Whether an evaluation has the types that `evaluate` writes; unlike the rest, no schema checks it."""

    def share(value: object) -> bool:
        return isinstance(value, (int, float)) and 0 <= value <= 1

    def several(name: str, fits: Callable[[object], bool]) -> bool:
        return isinstance(found[name], (list, tuple)) and all(map(fits, found[name]))

    return (
        all(share(found[name]) for name in ("accuracy", "original_accuracy", "agreement"))
        and isinstance(found["macs_fraction"], (int, float))
        and 0 <= found["macs_fraction"] < 1e6
        and isinstance(found["samples"], int)
        and 0 <= found["samples"] < 1e15
        and isinstance(found["labelled"], bool)
        and several("exits", lambda name: isinstance(name, str))
        and several("exit_shares", share)
        and several("exit_accuracies", lambda value: value is None or share(value))
        and len(found["exits"]) == len(found["exit_shares"]) == len(found["exit_accuracies"])
        and isinstance(measures := found.get("measures", {}), Mapping)
        and all(isinstance(value, (int, float)) and abs(value) < 1e15 for value in measures.values())
    )


def _front_matter(
    config: AdapterConfig, info: CardInfo, measured: Mapping[str, Any] | None, name: str
) -> ModelCardData:
    base, task = config.base, info.pipeline_tag or text.pipeline_tag(config)
    found = base.hub_id is not None and _is_id(base.hub_id) and text.found_by_name(base, config.own_base)
    own = {
        "base_model": base.hub_id,
        "base_model_relation": "finetune" if config.own_base else "adapter",
    }
    measured = None if stated_by(measured) else measured
    return ModelCardData(
        license=info.license,
        library_name="ee_surgery",
        pipeline_tag=task,
        tags=["early-exit", *([] if base.library == "torch" else [visible(base.library)]), "ee_surgery", *info.tags],
        datasets=list(info.datasets) or None,
        language=list(info.language) or None,
        model_name=None if measured is None else visible(name),
        eval_results=None
        if measured is None
        else _results(info, measured, task or "other", text.task_of(config).measure),
        **(own if found else {}),
    )


def _results(info: CardInfo, measured: Mapping[str, Any], task: str, measure: str) -> list[EvalResult]:
    """Entries for `model-index`, which requires a name of the data: `Unknown` if none was given."""
    labelled = measured["labelled"]
    metrics = {
        "accuracy": (measure.replace(" ", "_") if labelled else "agreement", text.accuracy_name(labelled, measure)),
        "macs_fraction": ("macs_fraction", "mean MACs, fraction of the original's"),
    }
    return [
        EvalResult(
            task_type=task,
            dataset_type=info.eval_dataset or "unknown",
            dataset_name=info.eval_name or info.eval_dataset or "Unknown",
            dataset_split=info.eval_split,
            metric_type=kind,
            metric_name=name,
            metric_value=measured[key],
        )
        for key, (kind, name) in metrics.items()
    ]


def _data(info: CardInfo, measured: Mapping[str, Any]) -> str:
    """Name of the evaluation data. A name given now does not apply to an evaluation that was loaded."""
    name = info.eval_name or info.eval_dataset
    if stated_by(measured) or name is None:
        return "data set not named"
    return ", ".join(markdown(word) for word in (name, info.eval_split) if word)


def _leaderboard(info: CardInfo, measured: Mapping[str, Any] | None, task: Task) -> list[EvalResultEntry]:
    """The accuracy for a benchmark; of other measures, nothing says whether they are the benchmark's."""
    if (
        task.measure != CLASSIFICATION.measure
        or measured is None
        or not measured["labelled"]
        or not info.eval_dataset
        or not info.eval_task
    ):
        return []
    notes = f"early exit at {measured['macs_fraction']:.2%} of the original's mean MACs, {measured['samples']} samples"
    return [EvalResultEntry(info.eval_dataset, info.eval_task, measured["accuracy"], notes=notes)]


def _render(
    change: FolderChange,
    config: AdapterConfig,
    frontier: Frontier | None,
    receipt: str | None,
    info: CardInfo,
    measured: Mapping[str, Any] | None,
    *,
    plot: bool,
) -> str:
    where = info.repo_id or change.folder.resolve().name
    name = where.rsplit("/", 1)[-1]
    training = text.settings(config.provenance.get(TRAINING))

    def said(part: str) -> dict[str, str | None]:
        return {"statement": text.statement(config.provenance, part)}

    card = ModelCard.from_template(
        _front_matter(config, info, measured, name),
        template_path=str(_TEMPLATE),
        marker=MARKER,
        title=markdown(name),
        summary=text.summary(config),
        snippet=text.snippet(config, frontier, where),
        usage=text.usage(config, frontier, where, processor=change.holds(PROCESSOR)),
        measured=None
        if measured is None
        else text.measured(measured, _data(info, measured), text.task_of(config)) | said(EVALUATION),
        frontier=None if frontier is None else text.trade_offs(frontier, PLOT if plot else None) | said(CALIBRATION),
        exits=text.exits(config, frontier),
        point=text.operating_point(config.operating_point, frontier) | said(CALIBRATION),
        search=None if (search := text.search(config.provenance)) is None else search | said(TRAINING),
        training=None if training is None else {"table": training} | said(TRAINING),
        original=text.original(config, receipt),
        limits=text.limits(config, frontier),
    )
    return str(card).rstrip() + "\n"
