"""The Pareto filter: of many trade-offs, those that no other one beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def pareto(
    points: Iterable[T],
    cost: Callable[[T], float],
    value: Callable[[T], float],
    always: Callable[[T], bool] = lambda point: False,
) -> list[T]:
    """Points from cheap to dear, each of more value than all cheaper ones.

    >>> pareto([(3, 0.9), (1, 0.5), (2, 0.4), (3, 0.8)], cost=lambda p: p[0], value=lambda p: p[1])
    [(1, 0.5), (3, 0.9)]

    Args:
        always: points that are kept whatever their value.
    """
    kept: list[T] = []
    for point in sorted(points, key=lambda p: (cost(p), -value(p))):
        if not kept or value(point) > value(kept[-1]) or always(point):
            kept.append(point)
    return kept
