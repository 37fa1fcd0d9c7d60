"""Branches on every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ee_surgery as ee
from ee_surgery.branches import resolve
from ee_surgery.branches.base import build
from ee_surgery.graph.points import ExitPoint

_POINT = ExitPoint("p", (), 0, "n", (8, 6, 6), "nchw", 0, 1, 10**7, 0.5, True, "", True)
POINTS = {
    "nchw": _POINT,
    "nhwc": replace(_POINT, shape=(6, 6, 8), layout="nhwc"),
    "tokens": replace(_POINT, shape=(16, 8), layout="tokens"),
    "class token": replace(_POINT, shape=(17, 8), layout="tokens", prefix_tokens=1),
    "odd tokens": replace(_POINT, shape=(11, 8), layout="tokens"),
    "vector": replace(_POINT, shape=(8,), layout="vector"),
}
NEEDS_GRID = {"conv2", "strided"}


@pytest.mark.parametrize("layout", POINTS)
@pytest.mark.parametrize("name", [*ee.BRANCHES, "auto"])
@pytest.mark.parametrize("confidence", [False, True])
def test_a_branch_gives_logits_confidence_and_its_macs(name: str, layout: str, confidence: bool) -> None:
    point = POINTS[layout]
    if name in NEEDS_GRID and layout in ("vector", "odd tokens"):
        with pytest.raises(ee.BranchError, match="needs a feature map"):
            build(ee.BranchSpec(name), point, 5)
        return
    spec, branch = resolve(ee.BranchSpec(name, confidence=confidence), point, 5, macs=10**7)
    assert spec.name in ee.BRANCHES
    branch.eval()
    features = torch.randn(3, *point.shape)
    answer = branch(features)
    assert answer.logits.shape == (3, 5)
    assert (answer.confidence is not None) == confidence
    if confidence:
        assert answer.confidence.shape == (3,)
    with FlopCounterMode(display=False) as counter:
        branch(features[:1])
    assert branch.macs(point.shape) == counter.get_total_flops() // 2
    (answer.logits.sum() + (answer.confidence.sum() if confidence else 0)).backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())


def test_conv2_costs_what_the_paper_says_on_resnet56() -> None:
    point = replace(_POINT, shape=(16, 32, 32))
    assert build(ee.BranchSpec("conv2"), point, 10).macs(point.shape) == pytest.approx(4.72e6, rel=1e-2)


def test_the_same_map_in_two_layouts_gives_the_same_logits() -> None:
    for name in ("pool", "conv2", "mlp", "strided"):
        first, last = build(ee.BranchSpec(name), POINTS["nchw"], 5), build(ee.BranchSpec(name), POINTS["nhwc"], 5)
        last.load_state_dict(first.state_dict())
        features = torch.randn(3, *POINTS["nchw"].shape)
        torch.testing.assert_close(first(features).logits, last(features.permute(0, 2, 3, 1)).logits)


def test_auto_stays_within_its_budget() -> None:
    for macs in (10**5, 10**6, 10**7, 10**9):
        point = replace(_POINT, shape=(32, 16, 16))
        spec, branch = resolve(ee.BranchSpec(), point, 10, macs)
        assert spec.name == "pool" or branch.macs(point.shape) <= 0.025 * macs


def test_users_add_their_own() -> None:
    @ee.BRANCHES.register("flat")
    class Flat(ee.Branch):
        def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False) -> None:
            super().__init__(point, num_classes, confidence, 8 * 36)

        def vector(self, features: torch.Tensor) -> torch.Tensor:
            return features.flatten(1)

    try:
        assert build(ee.BranchSpec("flat"), _POINT, 5)(torch.randn(2, 8, 6, 6)).logits.shape == (2, 5)
        with pytest.raises(ee.ConfigError, match="registered already"):
            ee.BRANCHES.register("flat")(Flat)
    finally:
        del ee.BRANCHES._items["flat"]


def test_unknown_branches_and_options_are_named() -> None:
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'strided'"):
        build(ee.BranchSpec("stridet"), _POINT, 5)
    with pytest.raises(ee.ConfigError, match="does not take"):
        build(ee.BranchSpec("pool", options={"width": 3}), _POINT, 5)
