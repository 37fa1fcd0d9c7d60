"""Placement of exits: rules on the cost of the blocks, or explicit names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ee_surgery.checks import count, flag, instance, names, plain
from ee_surgery.errors import ExitPointError
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.registry import Registry

Rule = Callable[[int], list[float]]

PLACEMENTS: Registry[Rule] = Registry("placement rule", "ee_surgery.placements")
"""Number of exits n -> n increasing targets, as fractions of the original's MACs."""


@PLACEMENTS.register("linear")
def linear(n: int) -> list[float]:
    """Evenly spaced: (i + 1) / (n + 1)."""
    return [(i + 1) / (n + 1) for i in range(n)]


@PLACEMENTS.register("fine")
def fine(n: int) -> list[float]:
    """Dense near the input: 1 - 0.95 ** (i + 1)."""
    return [1 - 0.95 ** (i + 1) for i in range(n)]


@PLACEMENTS.register("pareto")
def pareto(n: int) -> list[float]:
    """Each exit takes a fifth of the remaining cost: 1 - 0.8 ** (i + 1)."""
    return [1 - 0.8 ** (i + 1) for i in range(n)]


@PLACEMENTS.register("gold_ratio")
def gold_ratio(n: int) -> list[float]:
    """Ratios of the golden section: phi ** (i - n)."""
    phi = (1 + math.sqrt(5)) / 2
    return [phi ** (i - n) for i in range(n)]


_NEARLY = 1e-3  # share of the MACs


@dataclass(frozen=True)
class ExitPlan:
    """The chosen exit points of one model, in program order."""

    model_id: str
    rule: str
    """The placement rule, or `explicit`."""
    points: tuple[ExitPoint, ...]

    @property
    def names(self) -> list[str]:
        """Exit names in program order."""
        return [point.name for point in self.points]


def check_exits(exits: int | str | Sequence[str]) -> int | str | list[str]:
    """Validate a number of exits, `all` or names, without a model.

    Raises:
        ExitPointError: it is none of these.
    """
    if plain(exits) is not None:
        return count("exits", exits, error=ExitPointError)
    if isinstance(exits, str) and exits == "all":
        return exits
    given = names("exits", exits, ExitPointError, "Or a number of exits.")
    if not given:
        raise ExitPointError("The list of exits is empty: name at least one, or give a number.")
    return given


def place(
    graph: ModelGraph, exits: int | str | Sequence[str] = 3, rule: str = "linear", *, clip: bool = False
) -> ExitPlan:
    """Choose exit points.

    A rule walks the blocks in program order and takes, for each target, the first block whose fraction of the MACs
    reaches it within 0.001 (three of four equal layers end slightly before 3/4, because of the head), then continues
    after it. Only convolutions, linear layers and matrix products count, so several positions may have the same cost:
    the outermost module that ends there is taken, and the last of several (after the activation).

    Args:
        exits: a number, `all` for every block but the last, or the names of the points (`layer2.1`, `blocks.5`).
        rule: `linear`, `fine`, `pareto`, `gold_ratio` or a registered one; not used for names and `all`.
        clip: take fewer exits if the model has no room for as many, instead of raising.
    Raises:
        ExitPointError: an unknown, illegal or repeated name, or too few blocks.
        UnknownNameError: no such rule.
    Source: EENets (Demir & Akbas, arXiv:2409.05336) and PTEENet (Lahiany & Aperstein, arXiv:2501.02508).
    """
    instance("graph", graph, ModelGraph, hint="inspect(model) makes one.")
    clip = flag("clip", clip)
    model_id = graph.backbone.model_id
    blocks = sorted(graph.blocks, key=lambda p: (-p.name.count("."), p.index))
    # One candidate per cost: the outermost block that ends there, the last of several.
    candidates = {p.macs: p for p in blocks if 0 < p.macs < graph.macs}
    rest = sorted(candidates.values(), key=lambda point: point.index)
    exits = check_exits(exits)
    if isinstance(exits, str):  # all
        points = tuple(point for point in rest if point.macs_fraction < 1 - _NEARLY)
        if not points:
            raise ExitPointError(f"{model_id} has no block that ends before the full cost: name points yourself.")
        return ExitPlan(model_id, "all", points)
    if isinstance(exits, list):
        points = sorted((graph[name] for name in exits), key=lambda point: point.index)
        for before, after in itertools.pairwise(points):
            if before.index == after.index:
                raise ExitPointError(f"The exits {exits} name the position of {after.name!r} twice.")
        return ExitPlan(model_id, "explicit", tuple(points))
    chosen: list[ExitPoint] = []
    for target in PLACEMENTS[rule](exits):
        found = next((i for i, point in enumerate(rest) if point.macs_fraction >= target - _NEARLY), None)
        if found is None and clip and chosen:
            break
        if found is None:
            raise ExitPointError(
                f"{model_id} has no room for {exits} exits with the rule {rule!r}: {len(candidates)} blocks end before "
                f"the full cost, and none after {[p.name for p in chosen]} reaches {target:.1%} of it. "
                f"Ask for fewer, use another rule, or name points yourself ({len(graph.points)} are legal)."
            )
        chosen.append(rest[found])
        rest = rest[found + 1 :]
    return ExitPlan(model_id, rule, tuple(chosen))
