"""The operating point that a request means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.errors import OperatingPointError
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.scores import FittedScore

UNSAID: Any = object()
"""In place of a point, beside None, which means never leaving."""


def chosen(
    frontier: Frontier | None,
    branches: int,
    point: OperatingPoint | None = UNSAID,
    *,
    risk_of: str | None = None,
    thresholds: Sequence[float] | float | None = None,
    score: str | FittedScore | None = None,
    **wanted: Any,
) -> OperatingPoint | None:
    """A point that is given, one of the frontier, or thresholds by hand; see `EarlyExitModel.operate`.

    Args:
        branches: number of branches, for one threshold that is for all.
        wanted: requests to the frontier, see `Frontier.at`; None for those that are not made.
    Raises:
        OperatingPointError: not exactly one request, or one that cannot be met.
    """
    requests = {**wanted, "thresholds": thresholds, "point": point}
    asked = [name for name, value in requests.items() if value is not None and value is not UNSAID]
    if len(asked) > 1 or (not asked and point is UNSAID):
        choices = ", ".join(f"{name}=" for name in (*wanted, "thresholds"))
        seen = f"got {asked or 'none'}. operate(None): never leave early."
        raise OperatingPointError(f"Give exactly one of {choices}; {seen}")
    for name, value, owner, given in (
        ("score", score, "thresholds", thresholds),
        ("risk_of", risk_of, "risk", wanted.get("risk")),
    ):
        if value is not None and given is None:
            raise OperatingPointError(f"{name}= goes with {owner}=, which was not given.")
    if thresholds is not None:
        return OperatingPoint.by_hand(thresholds, "max_prob" if score is None else score, branches)
    if not asked or asked == ["point"]:
        return point
    if frontier is None:
        raise OperatingPointError("No frontier to choose from: run ee.calibrate(branched, held_out) first.")
    return frontier.at(**wanted, risk_of="disagreement" if risk_of is None else risk_of)
