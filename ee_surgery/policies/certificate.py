"""The guarantee of risk control about a policy, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ee_surgery.errors import DataError
from ee_surgery.text import visible


@dataclass(frozen=True)
class Certificate:
    """A guarantee about one policy: risk at most `eps` on data like the certifying data.

    It may be wrong with a chance of `delta` over the draw of that data, for one request; a series of requests that
    are all to hold at once needs `delta` shared between them. With method `crc` only the mean risk over many such
    draws is promised, and `delta` plays no part. Data of a different kind have no promise.
    """

    risk: str
    eps: float
    delta: float
    method: str
    thresholds: tuple[float, ...]
    """One per branch; all `inf` if nothing could be certified."""
    score: str
    n: int
    """Number of certifying samples, without those that chose the path."""
    observed: float
    """Mean loss on them."""
    certified: bool
    """False if no policy with an open exit was cleared; then all exits are closed, which loses nothing."""
    bound: float | None
    """Upper bound on the risk at level `delta`, for `crc` on the expected risk; None where nothing was certified."""
    data: str
    """SHA-256 of the certifying logits and labels."""
    per_exit: bool = False
    """Whether thresholds were chosen on a part of the records and certified on the rest."""
    seed: int = 0
    """Of that split and of the order of bets."""

    @property
    def promise(self) -> str:
        """The guarantee in words."""
        if not self.certified:
            return f"nothing: no early exit could be shown to keep {visible(self.risk)} within {self.eps:.3g}"
        how = "in expectation" if self.method == "crc" else f"with confidence {1 - self.delta:.3g}"
        return f"{visible(self.risk)} at most {self.eps:.3g} {how}"

    def __str__(self) -> str:
        return f"{self.promise} ({visible(self.method)}, {self.n} samples, observed {self.observed:.3g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `inf` as a string."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["thresholds"] = [t if math.isfinite(t) else str(t) for t in self.thresholds]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        """The inverse of `to_dict`.

        Raises:
            DataError: fields are missing or unknown.
        """
        try:
            return cls(**{**data, "thresholds": tuple(float(t) for t in data["thresholds"])})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A damaged certificate: {error!r}.") from error


@dataclass(frozen=True)
class Check:
    """Results of a certified policy on records."""

    observed: float
    """Its mean loss there."""
    n: int
    bound: float
    """Upper bound on the true risk from these records alone, too low with probability at most `delta`."""
    holds: bool
    """These records certify the policy (again)."""
    contradicted: bool
    """Evidence at level `delta` that the true risk here is above `eps`."""
    same_data: bool
    """Whether these are the records that the certificate was made from."""
    promise: str

    def __str__(self) -> str:
        verdict = "These data certify it" if self.holds else "These data neither certify nor contradict it"
        verdict = "The data contradict it" if self.contradicted else verdict
        which = "the certificate's own" if self.same_data else "new"
        return (
            f"Promised: {self.promise}. {verdict}: observed {self.observed:.3%} on {self.n} samples ({which}), "
            f"at most {self.bound:.3%} by them alone."
        )
