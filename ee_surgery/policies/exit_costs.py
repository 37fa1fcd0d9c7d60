"""Cost per sample of leaving at each exit: the trunk up to there and every branch visited."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def exit_costs(trunk: Sequence[int], branches: Sequence[int], visits: Sequence[bool]) -> list[int]:
    """MACs of leaving at each of K exits: the trunk up to it and every branch visited.

    >>> exit_costs(trunk=[10, 20, 30], branches=[1, 2], visits=[True, False])
    [11, 21, 31]

    Args:
        trunk: K numbers, `branches` and `visits`: K - 1.
    """
    paid = list(accumulate((cost * seen for cost, seen in zip(branches, visits, strict=True)), initial=0))
    # a sample that leaves at exit k has been to branch k; the original's own head has none
    return [t + p for t, p in zip(trunk, [*paid[1:], paid[-1]], strict=True)]
