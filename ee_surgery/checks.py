"""What users hand in, checked at the door: numbers, choices, names, objects. An error says what was wrong and seen."""

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

_LONGEST = 80  # characters of a value that an error repeats
MOST = 2**63 - 1
"""The largest whole number that torch and numpy take, as a seed for example."""


def shown(value: object) -> str:
    """A value as an error repeats it: short, whatever it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    if not isinstance(value, (str, bytes, Real, list, tuple, dict, set, type(None), os.PathLike, Tensor)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def refuse(name: str, wanted: str, value: object, error: Error = ConfigError, hint: str = "") -> NoReturn:
    """Raise the one sentence that all of these raise.

    Args:
        name: of the argument.
        wanted: what it must be.
        value: what was seen.
        error: a class of ours.
        hint: what to do; a sentence of its own.
    """
    raise error(f"{name} must be {wanted}, got {shown(value)}.{f' {hint}' if hint else ''}")


# --- numbers


def plain(value: object) -> int | float | None:
    """A number as Python's own int or float; None for what is none: flags, words, arrays, complex numbers.

    Numbers of numpy count, and tensors and arrays without dimensions.
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
    """A number within limits, as Python's own int or float.

    Args:
        name: of the argument.
        value: a number of Python or numpy, or a tensor without dimensions; never a flag or a word.
        low: the least that it may be.
        high: the largest.
        above: what it must be above.
        below: what it must be below.
        infinite: whether infinity is a number here; NaN never is.
        error: what to raise.
        hint: a sentence for the error.
    Raises:
        SurgeryError: it is none; of the class `error`.
    """
    found = plain(value)
    if found is None or not ((low <= found <= high and above < found < below) or (infinite and abs(found) == math.inf)):
        refuse(name, _wanted(low, high, above, below), value, error, hint)
    return found


def count(
    name: str, value: object, *, low: int = 1, high: int = MOST, error: Error = ConfigError, hint: str = ""
) -> int:
    """A whole number of at least `low`, as an int; 1e3 is one.

    Args:
        name: of the argument.
        value: as for `number`.
        low: the least that it may be.
        high: the largest.
        error: what to raise.
        hint: a sentence for the error.
    Raises:
        SurgeryError: it is none; of the class `error`.
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
        value: as for `number`, several of them.
        limits: of each, as for `number`.
    Raises:
        SurgeryError: one is none.
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
    """True or False, and nothing that only counts as such."""
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, "True or False", value, error)
    return bool(value)


def word(name: str, value: object, error: Error = ConfigError, hint: str = "") -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        refuse(name, "text", value, error, hint)
    return value


def choice(name: str, value: object, known: Iterable[C], error: Error = ConfigError) -> C:
    """One of a few words; the error suggests near ones."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        near = suggest(value, known) if isinstance(value, str) else ""
        refuse(name, f"one of {known}", value, error, near if near.startswith("Did") else "")
    return value  # pyright: ignore[reportReturnType]


def names(name: str, value: object, error: Error = ConfigError, hint: str = "") -> list[str]:
    """A list of names; one alone stands for a list of it."""
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
    """An object of a class."""
    if not isinstance(value, kind):
        kinds = " or ".join(cls.__name__ for cls in (kind if isinstance(kind, tuple) else (kind,)))
        refuse(name, f"{'an' if kinds[0] in 'AEIOU' else 'a'} {kinds}", value, error, hint)
    return value


def path(name: str, value: object, error: Error = ConfigError, hint: str = "") -> Path:
    """A path, which is not empty."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip() or "\0" in str(value):
        refuse(name, "a path", value, error, hint)
    return Path(value)


def optional(check: Callable[..., T]) -> Callable[..., T | None]:
    """The same check, but None passes."""

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
