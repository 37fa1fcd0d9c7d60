"""Checks of user arguments: numbers, choices, names, objects. Errors say what was wrong and what was seen."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from torch import Tensor

from ee_surgery.errors import ConfigError, SurgeryError, SurgeryWarning
from ee_surgery.registry import suggest

T = TypeVar("T")
C = TypeVar("C", bound=str)
Error = type[SurgeryError]

_LONGEST = 80  # most characters of a value in an error
MOST = 2**63 - 1
"""The largest integer that torch and numpy accept, as a seed for example."""


def shown(value: object) -> str:
    """A short description of any value for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    if not isinstance(value, (str, bytes, Real, list, tuple, dict, set, type(None), os.PathLike, Tensor)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers with thousands of digits; deeply nested lists
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def refuse(name: str, wanted: str, value: object, error: Error = ConfigError, hint: str = "") -> NoReturn:
    """Raise the error of all these checks: "<name> must be <wanted>, got <value>. <hint>"

    Args:
        name: of the argument.
        wanted: what it must be.
        value: what was seen.
        error: its class.
        hint: a sentence on what to do.
    """
    raise error(f"{name} must be {wanted}, got {shown(value)}.{f' {hint}' if hint else ''}")


# --- numbers


def plain(value: object) -> int | float | None:
    """A number as a Python int or float; None for anything else: flags, strings, arrays, complex numbers.

    Numpy numbers are accepted, and tensors and arrays without dimensions.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return value if isinstance(value, (int, float)) else float(value)


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
    error: Error = ConfigError,
    hint: str = "",
) -> float:
    """A number within limits, as a Python int or float.

    >>> number("drop", np.float32(0.5), low=0, high=1)
    0.5

    Args:
        name: of the argument.
        value: a Python or numpy number, or a tensor without dimensions; not a flag or a string.
        low: smallest value allowed.
        high: largest value allowed.
        above: exclusive lower limit.
        below: exclusive upper limit.
        infinite: whether infinity is allowed; NaN never is.
        error: class of the error.
        hint: a sentence for the error.
    Raises:
        SurgeryError: it is not such a number; of the class `error`.
    """
    found = plain(value)
    if found is None or not ((low <= found <= high and above < found < below) or (infinite and abs(found) == math.inf)):
        refuse(name, _wanted(low, high, above, below), value, error, hint)
    return found


def count(
    name: str, value: object, *, low: int = 1, high: int = MOST, error: Error = ConfigError, hint: str = ""
) -> int:
    """A whole number of at least `low`, as an int; 1e3 is allowed.

    Args:
        name: of the argument.
        value: as for `number`.
        low: smallest value allowed.
        high: largest value allowed.
        error: class of the error.
        hint: a sentence for the error.
    Raises:
        SurgeryError: it is not such a number; of the class `error`.
    """
    found = plain(value)
    if found is None or not low <= found <= high or found != int(found):
        limits = f"from {low} to {high}" if high < MOST else f"of at least {low}"
        refuse(name, f"a whole number {limits}", value, error, hint)
    return int(found)


def numbers(name: str, value: object, **limits: Any) -> tuple[float, ...]:
    """Several numbers, from a list, tuple, array or tensor of one dimension.

    Args:
        name: of the argument.
        value: a sequence of numbers.
        limits: of each number, as for `number`.
    Raises:
        SurgeryError: one of them is invalid.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, (Sequence, range)) or isinstance(value, (str, bytes)):
        refuse(name, "a list of numbers", value, limits.get("error", ConfigError), limits.get("hint", ""))
    return tuple(number(f"{name}[{i}]", each, **limits) for i, each in enumerate(value))


def _wanted(low: float, high: float, above: float, below: float) -> str:
    left, right = max(low, above), min(high, below)
    if math.isfinite(left) and math.isfinite(right):
        return f"a number in {'(' if above >= low else '['}{left:g}, {right:g}{')' if below <= high else ']'}"
    if left == 0:
        return "a positive number" if above == 0 else "a number of at least 0"
    if math.isfinite(left):
        return f"a number {'above' if above == left else 'of at least'} {left:g}"
    return "a number" if not math.isfinite(right) else f"a number of at most {right:g}"


def accuracy_drop(name: str, value: object, error: Error = ConfigError) -> float:
    """An accepted accuracy drop, in [0, 1]."""
    return number(name, value, low=0, high=1, error=error, hint="0.01 is one percentage point.")


def positive(name: str, value: object, error: Error = ConfigError, hint: str = "") -> float:
    """A finite number above 0."""
    return number(name, value, above=0, error=error, hint=hint)


# --- flags, words and objects


def flag(name: str, value: object, error: Error = ConfigError) -> bool:
    """True or False, not a truthy or falsy value."""
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, "True or False", value, error)
    return bool(value)


def word(name: str, value: object, error: Error = ConfigError, hint: str = "") -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value.strip():
        refuse(name, "text", value, error, hint)
    return value


def choice(name: str, value: object, known: Iterable[C], error: Error = ConfigError) -> C:
    """One of several strings; the error suggests close ones."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        near = suggest(value, known) if isinstance(value, str) else ""
        refuse(name, f"one of {known}", value, error, near if near.startswith("Did") else "")
    return value  # pyright: ignore[reportReturnType]


def names(name: str, value: object, error: Error = ConfigError, hint: str = "") -> list[str]:
    """A list of names; a single name becomes a list of one."""
    if isinstance(value, str):
        return [word(name, value, error, hint)]
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping, Tensor)):
        refuse(name, "a name or a list of names", value, error, hint)
    given = list(value)
    for i, each in enumerate(given):
        word(f"{name}[{i}]", each, error, hint)
    return given


def instance(
    name: str, value: object, kind: type[T] | tuple[type[T], ...], error: Error = ConfigError, hint: str = ""
) -> T:
    """An instance of a class."""
    if not isinstance(value, kind):
        kinds = " or ".join(cls.__name__ for cls in (kind if isinstance(kind, tuple) else (kind,)))
        refuse(name, f"{'an' if kinds[0] in 'AEIOU' else 'a'} {kinds}", value, error, hint)
    return value


def path(name: str, value: object, error: Error = ConfigError, hint: str = "") -> Path:
    """A non-empty path."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip() or "\0" in str(value):
        refuse(name, "a path", value, error, hint)
    return Path(value)


def optional(check: Callable[..., T]) -> Callable[..., T | None]:
    """The same check, but None is allowed."""

    def checked(name: str, value: object, **limits: Any) -> T | None:
        return None if value is None else check(name, value, **limits)

    return checked


# --- old names


def renamed(old: str, given: T | None, new: str, value: T) -> T:
    """The value of an argument that has a new name; the old one, where it was given, wins with a warning.

    Args:
        old: name until now.
        given: under the old name; None where it was not used.
        new: name from now on.
        value: under the new name.
    """
    if given is None:
        return value
    warnings.warn(f"{old} is now {new}; the old name goes in the next release.", SurgeryWarning, stacklevel=3)
    return given
