"""Branches on every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ee_surgery as ee
from ee_surgery.branches import resolve
from ee_surgery.branches.base import build, mixed_pool
from ee_surgery.graph.exit_points import ExitPoint
from tests.zoo import graph

_POINT = ExitPoint("p", (), 0, "n", (8, 6, 6), "nchw", 0, 1, 10**7, 0.5, True, "", True)
POINTS = {
    "nchw": _POINT,
    "nhwc": replace(_POINT, shape=(6, 6, 8), layout="nhwc"),
    "tokens": replace(_POINT, shape=(16, 8), layout="tokens"),
    "class token": replace(_POINT, shape=(17, 8), layout="tokens", prefix_tokens=1),
    "odd tokens": replace(_POINT, shape=(11, 8), layout="tokens"),
    "sequence": replace(_POINT, shape=(11, 8), layout="sequence"),
    "vector": replace(_POINT, shape=(8,), layout="vector"),
}
NEEDS_GRID = {"conv", "conv2", "conv3", "eenet", "msd", "branchy", "strided", "sdn", "residual"}
NEEDS_SIZE = {"plain"}
ANYWHERE = {"pool", "bnpool", "mlp", "token", "ztw"}
NEEDS_GRAPH = {"shortcut", "dense"}  # tests/graph/test_shortcut.py, tests/branches/test_dense.py
HEADS = sorted(set(ee.BRANCHES) - NEEDS_GRAPH)


def test_every_branch_is_known_to_these_tests() -> None:
    assert {name for name, branch in ee.BRANCHES.items() if branch.any_layout} == ANYWHERE
    assert set(ee.BRANCHES) == NEEDS_GRID | NEEDS_SIZE | ANYWHERE | NEEDS_GRAPH


@pytest.mark.parametrize("layout", POINTS)
@pytest.mark.parametrize("name", [*HEADS, "auto"])
@pytest.mark.parametrize("confidence", [False, True])
def test_a_branch_gives_logits_confidence_and_its_macs(name: str, layout: str, confidence: bool) -> None:
    point = POINTS[layout]
    if name in NEEDS_GRID and layout in ("vector", "odd tokens", "sequence"):
        with pytest.raises(ee.BranchError, match="needs a feature map"):
            build(ee.BranchSpec(name), point, 5)
        return
    if name in NEEDS_SIZE and layout == "sequence":
        with pytest.raises(ee.BranchError, match="features of a fixed size"):
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
    (answer.logits.logsumexp(-1).sum() + (answer.confidence.sum() if confidence else 0)).backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())
    heads = [branch.classifier, *([branch.confidence] if confidence else [])]
    assert all(p.grad.abs().sum() > 0 for head in heads for p in head.parameters() if p.grad is not None)


def test_conv2_costs_what_the_paper_says_on_resnet56() -> None:
    point = replace(_POINT, shape=(16, 32, 32))
    assert build(ee.BranchSpec("conv2"), point, 10).macs(point.shape) == pytest.approx(4.72e6, rel=1e-2)


def test_the_same_map_in_two_layouts_gives_the_same_logits() -> None:
    for name in sorted({"pool", "bnpool", "mlp", "token", "ztw", *NEEDS_GRID}):
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

        def vector(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return features.flatten(1)

    try:
        assert build(ee.BranchSpec("flat"), _POINT, 5)(torch.randn(2, 8, 6, 6)).logits.shape == (2, 5)
        with pytest.raises(ee.ConfigError, match="already registered"):
            ee.BRANCHES.register("flat")(Flat)
    finally:
        del ee.BRANCHES._items["flat"]


def test_unknown_branches_and_options_are_named() -> None:
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'strided'"):
        build(ee.BranchSpec("stridet"), _POINT, 5)
    with pytest.raises(ee.ConfigError, match="does not take"):
        build(ee.BranchSpec("pool", options={"width": 3}), _POINT, 5)


# --- each branch is what its paper says


def _at(*shape: int, fraction: float = 0.5) -> ExitPoint:
    return replace(_POINT, shape=shape, macs_fraction=fraction)


def _convs(branch: nn.Module) -> list[tuple[int, int, int]]:
    """Channels in and out, and stride, of the convolutions, all of them 3 x 3 with padding 1."""
    found = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) for m in found)
    return [(m.in_channels, m.out_channels, m.stride[0]) for m in found]


def _kinds(body: nn.Module) -> list[str]:
    return [type(m).__name__ for m in body.modules() if not isinstance(m, nn.Sequential)]


@pytest.mark.parametrize(("name", "depth"), [("conv", 1), ("conv2", 2), ("conv3", 3)])
def test_conv_branches_are_so_many_units_at_full_width_and_resolution(name: str, depth: int) -> None:
    point = _at(16, 32, 32)
    branch = build(ee.BranchSpec(name), point, 10)
    assert _convs(branch) == [(16, 16, 1)] * depth
    assert _kinds(branch.body) == ["Conv2d", "BatchNorm2d", "ReLU"] * depth
    assert all(m.bias is None for m in branch.modules() if isinstance(m, nn.Conv2d))
    one = 9 * 16 * 16 * 32 * 32
    assert branch.macs(point.shape) == depth * one + 16 * 10
    conv2 = build(ee.BranchSpec("conv2"), point, 10).macs(point.shape)
    assert branch.macs(point.shape) == pytest.approx(conv2 * depth / 2, rel=1e-3)
    asked = build(ee.BranchSpec("conv", options={"depth": depth}), point, 10)
    assert _convs(asked) == _convs(branch)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_residual_branches_are_as_large_as_the_budget_allows(budget: float, depthwise: bool) -> None:
    total = 126_000_000
    point = replace(_at(16, 32, 32), macs=total // 10, macs_fraction=0.1)
    given = ee.BranchSpec("residual", options={"budget": budget, "depthwise": depthwise})
    spec, branch = resolve(given, point, 10, total)
    macs = branch.macs(point.shape)
    assert macs <= budget * total + 10**4  # the linear layer is not budgeted
    if not depthwise:
        assert macs > 0.7 * budget * total
    assert branch.body(torch.randn(2, 16, 32, 32)).shape == (2, 2 * int(spec.options["width"]), 8, 8)
    assert "budget" not in spec.options
    assert resolve(spec, point, 10, total)[1].macs(point.shape) == macs
    deeper, wider = (build(replace(spec, options=dict(spec.options) | more), point, 10) for more in (
        {"depth": int(spec.options["depth"]) + 1}, {"width": 2 * int(spec.options["width"])}
    ))  # fmt: skip
    assert min(deeper.macs(point.shape), wider.macs(point.shape)) > macs


def test_a_residual_branch_in_front_of_all_macs_needs_a_width() -> None:
    point = replace(_at(16, 32, 32), macs=0, macs_fraction=0.0)
    with pytest.raises(ee.BranchError, match="give width= instead"):
        build(ee.BranchSpec("residual"), point, 10)
    assert build(ee.BranchSpec("residual", options={"width": 8}), point, 10).macs(point.shape) > 0


@pytest.mark.parametrize(("channels", "side", "widths"), [(64, 32, 16), (128, 16, 32)])
def test_eenet_costs_what_its_resnet56_3_says(channels: int, side: int, widths: int) -> None:
    point = _at(channels, side, side)
    branch = build(ee.BranchSpec("eenet", options={"narrow": 4}), point, 10)
    assert _convs(branch) == [(channels, widths, 1), (widths, widths, 1), (widths, widths, 1)]
    assert _kinds(branch.body) == ["Conv2d", "BatchNorm2d", "ReLU"] * 3
    assert branch.classifier.in_features == widths
    assert branch.macs(point.shape) == pytest.approx(14.16e6, rel=1e-3)


@pytest.mark.parametrize(("channels", "width"), [(16, 16), (255, 255), (256, 64), (1024, 256)])
def test_eenet_narrows_what_looks_like_a_bottleneck(channels: int, width: int) -> None:
    branch = build(ee.BranchSpec("eenet"), _at(channels, 4, 4), 10)
    assert [out for _, out, _ in _convs(branch)] == [width] * 3


def test_msd_halves_the_map_twice() -> None:
    branch = build(ee.BranchSpec("msd"), _at(16, 32, 32), 10)
    assert _convs(branch) == [(16, 128, 2), (128, 128, 2)]
    assert branch.body(torch.randn(2, 16, 32, 32)).shape == (2, 128, 8, 8)
    assert branch.macs((16, 32, 32)) == 9 * 16 * 128 * 16**2 + 9 * 128 * 128 * 8**2 + 128 * 10


@pytest.mark.parametrize(("fraction", "depth"), [(0.01, 3), (0.33, 3), (0.34, 2), (0.66, 2), (0.67, 1), (0.99, 1)])
def test_branchy_is_deeper_the_earlier_it_sits(fraction: float, depth: int) -> None:
    branch = build(ee.BranchSpec("branchy"), _at(16, 8, 8, fraction=fraction), 10)
    assert _convs(branch) == [(16, 32, 1), (32, 32, 1), (32, 32, 1)][:depth]
    assert branch.classifier.in_features == 32 * 4 * 4
    assert len(_convs(build(ee.BranchSpec("branchy", options={"depth": 2}), _at(16, 8, 8), 10))) == 2


@given(share=st.floats(0, 1), side=st.integers(1, 9), seed=st.integers(0, 100))
def test_sdn_pools_by_its_formula(share: float, side: int, seed: int) -> None:
    maps = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    branch = build(ee.BranchSpec("sdn"), _at(3, side, side), 5)
    cells = min(4, side)
    with torch.no_grad():
        branch.share.fill_(share)
    expected = share * F.adaptive_max_pool2d(maps, cells) + (1 - share) * F.adaptive_avg_pool2d(maps, cells)
    torch.testing.assert_close(branch.vector(maps), expected.flatten(1))
    assert branch.classifier.in_features == 3 * cells**2


def test_sdn_mixes_by_a_learned_share_between_largest_and_mean() -> None:
    maps = torch.arange(64.0).view(1, 1, 8, 8)  # cells of 2 x 2
    largest = [9 + 2 * column + 16 * row for row in range(4) for column in range(4)]
    assert mixed_pool(maps, 4, torch.tensor(1.0)).tolist() == [largest]
    assert mixed_pool(maps, 4, torch.tensor(0.0)).tolist() == [[value - 4.5 for value in largest]]
    branch = build(ee.BranchSpec("sdn"), _at(1, 8, 8), 2)
    assert 0 <= branch.share.item() <= 1
    branch(maps).logits[:, 0].sum().backward()
    assert branch.share.grad != 0


def test_plain_reads_the_features_as_large_as_they_are() -> None:
    deep = build(ee.BranchSpec("plain"), _at(8, 3, 5), 4)  # behind strides the map is no longer the picture's size
    assert deep.classifier.in_features == 8 * 3 * 5
    features = torch.randn(2, 8, 3, 5)
    expected = features.flatten(1) @ deep.classifier.weight.T + deep.classifier.bias
    torch.testing.assert_close(deep(features).logits, expected)
    assert deep.macs((8, 3, 5)) == 8 * 3 * 5 * 4


def test_pool_is_the_mean_of_the_map_and_a_linear_layer() -> None:
    branch, features = build(ee.BranchSpec("pool"), _POINT, 5), torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(branch(features).logits, branch.classifier(features.mean((2, 3))))
    assert branch.macs(_POINT.shape) == 8 * 5


@pytest.mark.parametrize("layout", POINTS)
def test_the_norm_of_bnpool_is_saved_trained_and_still_in_eval_mode(layout: str) -> None:
    point = POINTS[layout]
    branch = build(ee.BranchSpec("bnpool"), point, 5)
    assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= branch.state_dict().keys()
    features = 3 + 2 * torch.randn(64, *point.shape)
    branch.train()
    branch(features).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.norm.parameters())
    dims = [0, 2, 3] if layout == "nchw" else list(range(features.ndim - 1))
    torch.testing.assert_close(branch.norm.running_mean, 0.1 * features.mean(dims))
    before = branch.norm.running_mean.clone()
    branch.eval()
    whole = branch(features).logits
    torch.testing.assert_close(branch(features[:1]).logits, whole[:1])  # statistics of no batch
    assert torch.equal(branch.norm.running_mean, before)


def test_bnpool_is_norm_relu_mean_linear() -> None:
    features = torch.randn(4, 8, 6, 6)
    for relu in (True, False):
        branch = build(ee.BranchSpec("bnpool", options={"relu": relu}), _POINT, 5)
        branch.norm.running_mean.uniform_(-1, 1)
        branch.norm.running_var.uniform_(0.5, 2)
        branch.eval()
        norm = branch.norm
        normed = F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        expected = (F.relu(normed) if relu else normed).mean((2, 3))
        torch.testing.assert_close(branch.vector(features), expected)


def test_bnpool_leaves_padding_out_of_the_mean() -> None:
    branch = build(ee.BranchSpec("bnpool"), POINTS["sequence"], 5).eval()
    features, mask = torch.randn(2, 11, 8), torch.ones(2, 11)
    mask[1, 6:] = 0
    wild = torch.where(mask[..., None] == 0, 1e3, features)
    torch.testing.assert_close(branch(wild, mask).logits, branch(features, mask).logits)
    torch.testing.assert_close(branch(features, mask).logits[1:], branch(features[1:, :6]).logits)


@pytest.mark.parametrize(
    ("shape", "cells", "flat"), [((16, 32, 32), 4, 256), ((32, 16, 16), 3, 288), ((512, 7, 7), 1, 512)]
)
def test_mlp_pools_to_about_256_numbers(shape: tuple[int, ...], cells: int, flat: int) -> None:
    branch = build(ee.BranchSpec("mlp"), _at(*shape), 10)
    assert (branch.cells, branch.hidden.in_features, branch.hidden.out_features) == (cells, flat, 64)
    assert branch.macs(shape) == flat * 64 + 64 * 10


def test_mlp_norms_before_the_pooling_where_blocks_begin_with_a_norm() -> None:
    options = {"preact": True, "norm": True, "hidden": 12, "cells": 2}
    branch = build(ee.BranchSpec("mlp", options=options), _POINT, 5)
    features = 5 * torch.randn(32, 8, 6, 6)
    branch.train()
    (seen,) = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
    normed = F.relu(F.batch_norm(features, None, None, seen.weight, seen.bias, training=True))
    hidden = branch.hidden(F.adaptive_avg_pool2d(normed, 2).flatten(1))
    expected = F.relu(F.batch_norm(hidden, None, None, branch.norm.weight, branch.norm.bias, training=True))
    torch.testing.assert_close(branch.vector(features), expected)
    with pytest.raises(ee.BranchError, match="preact=True needs a feature map"):
        build(ee.BranchSpec("mlp", options={"preact": True}), POINTS["vector"], 5)


def test_ztw_is_conv_relu_mixed_pool_linear_on_maps() -> None:
    branch, features = build(ee.BranchSpec("ztw", options={"ensemble": False}), _POINT, 5), torch.randn(3, 8, 6, 6)
    assert _convs(branch) == [(8, 8, 1)]
    expected = mixed_pool(F.relu(branch.conv(features)), 4, branch.share)
    torch.testing.assert_close(branch(features).logits, branch.classifier(expected))
    assert branch.classifier.in_features == 8 * 16


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_gets_a_gradient_in_training(name: str) -> None:
    point = _at(8, 6, 6, fraction=0.2)
    branch = build(ee.BranchSpec(name, confidence=True), point, 5).train()
    answer = branch(torch.randn(64, *point.shape))
    (answer.logits.logsumexp(-1).sum() + answer.confidence.square().sum()).backward()
    silent = {n for n, p in branch.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == ({"ensemble.weight", "ensemble.bias"} if name == "ztw" else set())  # fitted afterwards


@pytest.mark.parametrize("name", HEADS)
def test_no_branch_writes_to_the_features_it_reads(name: str) -> None:
    branch, features = build(ee.BranchSpec(name), _POINT, 5), torch.randn(4, 8, 6, 6)
    before = features.clone()
    branch(features)
    assert torch.equal(features, before)


@pytest.mark.parametrize("name", sorted(NEEDS_GRID - {"strided"} | {"mlp", "ztw"}))
@pytest.mark.parametrize("side", [1, 2, 3])
def test_small_maps_are_pooled_to_no_more_cells_than_they_have(name: str, side: int) -> None:
    branch = build(ee.BranchSpec(name), _at(8, side, side), 5).eval()
    assert branch(torch.randn(2, 8, side, side)).logits.isfinite().all()


# --- all exits, and fewer where there is no room


def test_all_exits_are_every_block_but_the_last() -> None:
    found = graph("cifar-resnet20")
    plan = ee.place(found, "all")
    assert plan.rule == "all"
    shares = [point.macs_fraction for point in plan.points]
    assert shares == sorted(set(shares))
    assert all(0 < share < 0.999 for share in shares)
    names = {name for point in plan.points for name in (point.name, *point.aliases)}
    blocks = {f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)}
    assert blocks - names == {"layer3.2"}
    assert ee.place(found, "all", "no such rule is looked up") == plan
    assert ee.place(found, "all", clip=True) == plan


def test_all_exits_of_the_resnet56_are_its_blocks() -> None:
    points = ee.place(graph("cifar-resnet56"), "all").points
    names = [{point.name, *point.aliases} for point in points]
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(9)][:-1]
    found = [next(i for i, known in enumerate(names) if block in known) for block in blocks]
    assert found == sorted(found)
    assert len(points) - len(blocks) in (0, 1)  # the stem may be one, too


@pytest.mark.parametrize("rule", ["linear", "fine", "pareto", "gold_ratio"])
def test_fewer_exits_are_taken_only_where_one_asks_for_it(rule: str) -> None:
    found = graph("cifar-resnet20")
    with pytest.raises(ee.ExitPointError, match="has no room for 40 exits"):
        ee.place(found, 40, rule)
    plan = ee.place(found, 40, rule, clip=True)
    assert 1 <= len(plan.points) < 40
    assert plan.rule == rule
    indices = [point.index for point in plan.points]
    assert indices == sorted(set(indices))
    assert ee.place(found, 2, rule, clip=True) == ee.place(found, 2, rule)  # no effect where there is room


def test_every_branch_trains_a_step_on_a_chain_of_all_exits() -> None:
    found = graph("cifar-resnet20")
    plan = ee.place(found, "all")
    names = HEADS[: len(plan.points)]
    model = ee.attach(found, plan, [*names, *["pool"] * (len(plan.points) - len(names))])
    x = torch.randn(8, 3, 32, 32)
    data: list[tuple[Tensor, Tensor]] = [(x, torch.arange(8))]
    report = ee.train(model, data, ee.TrainConfig(epochs=1, ensemble_epochs=0, progress=False))
    assert report.epochs[0].skipped == 0
    assert model.all_exits(x).isfinite().all()
    assert model.receipt().unchanged
