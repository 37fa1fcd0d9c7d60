"""Who stated an adapter's numbers: its publisher, until they are measured again here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CALIBRATION, EVALUATION, TRAINING = "calibration", "evaluation", "training"
STATED_BY, LOADED_FROM = "stated_by", "loaded_from"
ATTACHED = "attached"
"""SHA-256 of each branch as it was attached, by exit: those that are still so are untrained."""
# Card fields about the branches. The others are about one repository and one evaluation.
_FACTS = ("license", "datasets", "language", "tags", "pipeline_tag")


def as_stated(provenance: Mapping[str, Any], source: str, *, calibrated: bool) -> dict[str, Any]:
    """The provenance of a loaded model.

    Training, calibration and evaluation are marked as stated by the source, or by the source that it already names;
    redoing them replaces the entry, without the mark.

    Args:
        provenance: as stored.
        source: repository, or name of the folder.
        calibrated: whether a frontier or an operating point is stored.
    """
    found = {**provenance, LOADED_FROM: source}
    if calibrated:
        found.setdefault(CALIBRATION, {})
    else:
        found.pop(CALIBRATION, None)
    for name in (CALIBRATION, EVALUATION, TRAINING):
        if name not in found:
            continue
        if isinstance(found[name], Mapping):
            found[name] = {**found[name], STATED_BY: stated_by(found[name]) or source}
        else:
            found[name] = {STATED_BY: source} if name == CALIBRATION else {}
    card = found.pop("card", None)
    if isinstance(card, Mapping) and (kept := {name: card[name] for name in _FACTS if name in card}):
        found["card"] = kept
    return found


def forget_measured(provenance: dict[str, Any]) -> None:
    """Remove results that belong to earlier weights."""
    for name in (CALIBRATION, EVALUATION):
        provenance.pop(name, None)


def stated_by(found: object) -> str | None:
    """The source that stated a part of the provenance; None if it was done here."""
    name = found.get(STATED_BY) if isinstance(found, Mapping) else None
    return name if isinstance(name, str) and name.strip() else None
