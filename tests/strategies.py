"""What hypothesis draws in more than one test file: records, and what users register."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.policies.scores import State
from ee_surgery.registry import Registry
from ee_surgery.training.objectives import Answers, ObjectiveSettings

SEEDS = st.integers(0, 1000)


def synthetic(n: int = 400, k: int = 4, classes: int = 5, seed: int = 0, ties: bool = False) -> ee.ExitRecords:
    """Records of exits that get better with depth, their confidence informative."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    hardness = torch.rand(n, generator=g)
    logits = torch.randn(k, n, classes, generator=g)
    for i in range(k):
        logits[i, torch.arange(n), labels] += 4 * (0.4 + 0.6 * (i + 1) / k) * (1.2 - hardness)
    if ties:
        logits = logits.round()
    trunk = tuple(int(100 * (i + 1) / k) for i in range(k))
    return ee.ExitRecords(tuple(f"exit{i}" for i in range(k - 1)), logits, trunk, (3,) * (k - 1), labels)


def records(n: int = 400, k: int = 4) -> st.SearchStrategy[ee.ExitRecords]:
    """Synthetic records of n samples at k exits, with and without ties among the scores."""
    return st.builds(synthetic, st.just(n), st.just(k), seed=SEEDS, ties=st.booleans())


# --- what users register


@dataclass(frozen=True)
class Registered:
    """An object to register, and the properties it is registered with."""

    registry: Registry[Any]
    item: Any
    properties: dict[str, object]


@contextmanager
def registered(*things: Registered) -> Iterator[list[str]]:
    """Names under which these things are registered inside."""
    with ExitStack() as stack:
        names = [f"drawn_{i}" for i in range(len(things))]
        for name, thing in zip(names, things, strict=True):
            thing.registry.register(name, **thing.properties)(thing.item)
            stack.callback(thing.registry._items.pop, name)
        yield names


_MEMORIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda total, own: total + own, "max": torch.maximum, "last": lambda before, own: 0.5 * (before + own)
}  # fmt: skip


@st.composite
def scores(draw: st.DrawFn) -> Registered:
    """Scores with and without a state, which say that they keep one or leave it to be found."""
    own = ee.SCORES[draw(st.sampled_from(["max_prob", "margin", "entropy"]))]
    memory = draw(st.sampled_from([None, *_MEMORIES]))

    def score(logits: Tensor, confidence: Tensor | None, state: State) -> tuple[Tensor, State]:
        now = own(logits, None, ())[0]
        if memory is None:
            return now, ()
        exits = state[1] + 1 if state else torch.ones_like(now)
        kept = _MEMORIES[memory](state[0], now) if state else now
        return kept / exits if memory == "mean" else kept, (kept, exits)

    stated = draw(st.booleans())
    return Registered(ee.SCORES, score, {"stateful": memory is not None} if stated else {})


@st.composite
def branches(draw: st.DrawFn) -> Registered:
    """Branches on feature maps: a width, an activation and a way to pool."""
    width = draw(st.integers(1, 6))
    activation = draw(st.sampled_from([F.relu, F.gelu, torch.tanh]))
    pool = draw(st.sampled_from([Tensor.mean, Tensor.amax]))

    class Drawn(ee.Branch):
        def __init__(self, point: ee.ExitPoint, num_classes: int, confidence: bool = False) -> None:
            super().__init__(point, num_classes, confidence, width)
            self.narrow = nn.Conv2d(point.shape[0], width, 1)

        def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
            return pool(activation(self.narrow(features)), (2, 3))

    return Registered(ee.BRANCHES, Drawn, {})


@st.composite
def losses(draw: st.DrawFn) -> Registered:
    """Losses on the labels, which say that they need not the original's answers or say nothing."""
    power, smoothing = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([0.0, 0.1]))

    def loss(answers: Answers, config: ObjectiveSettings) -> Tensor:
        exits = torch.stack(
            [F.cross_entropy(z, answers.labels, reduction="none", label_smoothing=smoothing) for z in answers.learning]
        )
        return ((1 - (-exits).exp()) ** power * exits).mean(1).sum()

    return Registered(ee.OBJECTIVES, loss, draw(st.sampled_from([{}, {"reads_original": False}])))
