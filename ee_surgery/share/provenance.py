"""Whose numbers an adapter states: those of whoever published it, until they are measured again here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CALIBRATION, EVALUATION, TRAINING = "calibration", "evaluation", "training"
STATED_BY, LOADED_FROM = "stated_by", "loaded_from"
# Of what a card was told: facts about the branches. The rest is about one repository and one evaluation.
_FACTS = ("license", "datasets", "language", "tags", "pipeline_tag")


def as_stated(provenance: Mapping[str, Any], source: str, *, calibrated: bool) -> dict[str, Any]:
    """The provenance of a model that was loaded.

    What was measured, calibrated and trained is marked as a statement of the source, or of the one that the source
    names already; doing it again replaces it, without the mark.

    Args:
        provenance: as it is stored.
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
    """Leave out what was of the weights before."""
    for name in (CALIBRATION, EVALUATION):
        provenance.pop(name, None)


def stated_by(found: object) -> str | None:
    """Who stated a part of the provenance; None where it was done here."""
    name = found.get(STATED_BY) if isinstance(found, Mapping) else None
    return name if isinstance(name, str) and name.strip() else None
