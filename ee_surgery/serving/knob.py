"""The operating point of a served model, read and moved as plain data."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ee_surgery.errors import DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.monitoring.audit import Audit
from ee_surgery.policies.operating_point import OperatingPoint, describe

WANTED = '{"max_accuracy_drop": 0.01}, {"budget": 0.6}, {"point": 0} or {"off": true}'


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    budget: Annotated[float, Field(gt=0)] | None = None
    point: Annotated[int, Field(ge=0)] | None = None
    off: bool | None = None


def read_request(data: object) -> dict[str, Any]:
    """One request for an operating point, checked.

    Args:
        data: of the form `WANTED`, as Python objects.
    Raises:
        DataError: it is none, or several.
    """
    try:
        asked = _Form.model_validate(data).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{place or 'The request'}: {first['msg']}. Send one of {WANTED}.") from error
    if len(asked) != 1 or asked.get("off") is False:
        raise DataError(f"Send one of {WANTED}.")
    return asked


def move(branched: EarlyExitModel, request: object, audit: Audit | None = None) -> None:
    """Set the operating point that a request means, for all requests to the model that come from now on.

    An audit begins anew where the point is another one: its evidence was about the one before.

    Raises:
        DataError: it is no request, or there is no such point.
        OperatingPointError: no point meets it, or there is no frontier. The operating point stays what it was.
    """
    asked, before = read_request(request), describe(branched.operating_point)
    if "off" in asked:
        branched.operate(None)
    elif "point" in asked:
        points = _points(branched)
        if asked["point"] >= len(points):
            raise DataError(f"There is no point {asked['point']}: the frontier has {len(points)}.")
        branched.operate(points[asked["point"]])
    else:
        branched.operate(**asked)
    if audit is not None and describe(branched.operating_point) != before:
        audit.reset()


def state(branched: EarlyExitModel) -> dict[str, Any]:
    """The point in force (null: no sample leaves early), its place on the frontier (null where it is not on it), and
    the frontier, from the cheapest point to the most expensive one."""
    point, points = branched.operating_point, _points(branched)
    own = describe(point)
    return {
        "point": None if own is None or point is None else _plain(point),
        "index": next((i for i, each in enumerate(points) if describe(each) == own), None),
        "frontier": [_plain(each) for each in points],
    }


def macs_fraction(branched: EarlyExitModel) -> float:
    """Of the point in force, as calibrated; 1 where no sample leaves early, NaN where it was set by hand."""
    point = branched.operating_point
    return 1.0 if point is None or point.policy.closed else point.macs_fraction


def _points(branched: EarlyExitModel) -> tuple[OperatingPoint, ...]:
    return () if branched.frontier is None else branched.frontier.points


def _plain(point: OperatingPoint) -> dict[str, Any]:
    numbers = {
        "macs_fraction": point.macs_fraction, "accuracy": point.accuracy, "expected_accuracy": point.expected_accuracy,
        "accuracy_drop": point.accuracy_drop,
    }  # fmt: skip
    known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**known, "exit_shares": list(point.exit_shares)}
