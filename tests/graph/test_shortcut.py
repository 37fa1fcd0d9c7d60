"""Shortcut branches: copies of some remaining blocks, cut from the graph, on any model."""

from __future__ import annotations

import copy
import gc
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import ee_surgery as ee
from ee_surgery.branches.shortcut import ShortcutBranch
from ee_surgery.graph.shortcut import TAIL, named, pieces, within
from tests import zoo
from tests.zoo import BY_NAME, EVERY, TEXTS, Entry


def shortcut(**options: int | float | str) -> ee.BranchSpec:
    return ee.BranchSpec("shortcut", options=options)


@pytest.fixture
def graph() -> ee.ModelGraph:
    return zoo.graph("cifar-resnet20")


def fresh(exits: list[str] | None = None, **options: int | float | str) -> ee.EarlyExitModel:
    found = zoo.graph("cifar-resnet20")
    return ee.attach(found, ee.place(found, exits or ["layer1.0"]), shortcut(**options))


# --- which way it takes


def test_pieces_are_the_rest_of_the_model(graph: ee.ModelGraph) -> None:
    found = pieces(graph, graph["layer1.0"])
    assert [piece.name for piece in found] == [
        "layer1.1", "layer1", "layer2.0", "layer2.1", "layer2", "layer3.0", "layer3.1", "layer3", TAIL,
    ]  # fmt: skip
    assert [piece.name for piece in found if not piece.optional] == ["layer2.0", "layer3.0", TAIL]
    assert sum(piece.macs for piece in found) == graph.macs - graph["layer1.0"].macs
    assert all(left.stop == right.start for left, right in pairwise(found))


def test_a_budget_spreads_what_it_keeps_and_leaves_the_exits_own_run_out(graph: ee.ModelGraph) -> None:
    found = pieces(graph, graph["layer1.0"])
    kept = {share: within(found, share * graph.macs) for share in (0.1, 0.2, 0.5, 1.0)}
    assert kept[0.1] is None
    assert [p.name for p in kept[0.2] or []] == ["layer2.0", "layer3.0", TAIL]
    assert [p.name for p in kept[0.5] or []] == ["layer2.0", "layer2", "layer3.0", "layer3", TAIL]
    assert [p.name for p in kept[1.0] or []] == [
        "layer2.0",
        "layer2.1",
        "layer2",
        "layer3.0",
        "layer3.1",
        "layer3",
        TAIL,
    ]


def test_of_one_run_the_last_stays_and_norms_are_never_jumped_over() -> None:
    graph = ee.inspect(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10))
    found = pieces(graph, graph["blocks.4"])
    kept = within(found, 2.1 / 12 * graph.macs)
    assert [piece.name for piece in kept or []] == ["blocks.8", "blocks", "norm", TAIL]
    assert [p.name for p in named(found, ["blocks.10", "blocks"])] == ["blocks.10", "blocks", "norm", TAIL]


def test_what_cannot_be_is_said(graph: ee.ModelGraph) -> None:
    with pytest.raises(ee.BranchError, match=r"shortest path from 'layer1\.0' .* more than the budget of 5\.0%"):
        fresh(budget=0.05)
    with pytest.raises(ee.BranchError, match=r"No block 'layer2\.9'.*layer2\.\d"):
        fresh(blocks="layer2.9")
    with pytest.raises(ee.BranchError, match="put it there with `attach`"):
        ee.branches.base.build(shortcut(), graph["layer1.0"], 10)
    with pytest.raises(ee.BranchError, match="has no head to copy"):
        ee.augment(timm.create_model("test_resnet", num_classes=0), 1, branch="shortcut", num_classes=5)


# --- what it computes


@pytest.mark.parametrize("entry", EVERY)
def test_with_all_blocks_it_is_the_original(entry: Entry) -> None:
    graph, x = zoo.graph(entry.name), entry.sample()
    point = next(p for p in graph.blocks if p.macs_fraction > 0.1)
    every = " ".join(piece.name for piece in pieces(graph, point) if piece.optional)
    plan = ee.ExitPlan(graph.backbone.model_id, "by hand", (point,))
    branched = ee.attach(graph, plan, shortcut(blocks=every))
    copied, original = branched.all_exits(x)
    torch.testing.assert_close(copied, original, rtol=1e-4, atol=1e-5)
    assert sum(branched.branch_macs) == graph.macs - point.macs
    assert branched.receipt().unchanged


@pytest.mark.parametrize("special", TEXTS[:4], ids=str)
def test_texts_take_their_mask_along(special: object) -> None:
    branched = special.augment(1, branch=shortcut(budget=0.9))  # pyright: ignore[reportAttributeAccessIssue]
    x = {name: tensor for name, tensor in branched.sample.items() if isinstance(tensor, torch.Tensor)}
    short = branched.all_exits(**x)
    if "attention_mask" in x:
        x["attention_mask"] = x["attention_mask"].clone()
        x["attention_mask"][:, -3:] = 0
        assert not torch.allclose(short[0], branched.all_exits(**x)[0])
    assert torch.isfinite(short).all()


def test_routed_equals_replayed_and_every_live_tensor_is_compacted() -> None:
    for name in ("cifar-resnet20", "densenet121", "hrnet_w18_small"):
        x, found = BY_NAME[name].sample(6), zoo.graph(name)
        branched = ee.attach(found, ee.place(found, 2), shortcut(budget=1.0))
        answers = branched.all_exits(x)
        top = answers[0].softmax(-1).amax(-1)
        branched.operate(thresholds=top.median().item())
        out = branched.predict(x)
        left = top >= top.median()
        assert (out.exit_index == 0).tolist() == left.tolist(), name
        torch.testing.assert_close(out.logits[left], answers[0][left], rtol=1e-4, atol=1e-5)


def test_other_sizes_are_cut_anew_on_the_same_weights() -> None:
    branched = fresh(budget=0.5)
    small, large = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 48, 48)
    first = branched.all_exits(small)
    assert torch.isfinite(branched.all_exits(large)).all()
    assert torch.equal(branched.all_exits(small), first)


# --- its weights


@pytest.mark.slow
def test_code_for_sizes_long_gone_is_gone_too() -> None:
    branched = fresh()
    branch = branched.branches[0]
    assert isinstance(branch, ShortcutBranch)
    branched.operate(thresholds=[0.0])
    given = {size: torch.randn(2, 3, size, size) for size in range(16, 36, 2)}
    answers = {size: branched.all_exits(x)[0] for size, x in given.items()}
    assert 1 < len(branch._ways) <= len(branched.engine.programs) < len(given)
    for size in (16, 18):  # those that are gone are written anew
        assert torch.equal(branched(given[size]), answers[size])
    small = given[16]
    branched(small)  # routed: the last one it knows
    for size in list(given)[1:]:
        branched.all_exits(given[size])
    assert torch.equal(branched(small), answers[16])
    other = branched.with_exits(branched.exits)  # with the same branch
    other(small)
    del other
    gc.collect()
    assert torch.equal(branched(small), answers[16])


def test_training_moves_the_copies_and_their_statistics_alone() -> None:
    branched = fresh(budget=0.5)
    before = {name: tensor.clone() for name, tensor in branched.branches.state_dict().items()}
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)
    config = ee.TrainConfig(epochs=1, batch_size=16, validation=0, progress=False, distill=0, cutmix=1.0)
    report = ee.train(branched, data, config)
    after = branched.branches.state_dict()
    assert report.epochs[0].skipped == 0
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert any("running_mean" in name for name in before)
    assert branched.receipt().unchanged


def test_copies_of_the_model_have_weights_of_their_own(tmp_path: Path) -> None:
    branched, x = fresh(budget=0.5), torch.randn(4, 3, 32, 32)
    expected = branched.all_exits(x)
    others = [branched.copy(), copy.deepcopy(branched), pickle.loads(pickle.dumps(branched))]
    loaded = ee.from_pretrained(branched.save_pretrained(tmp_path / "adapter"), branched.unload())
    assert loaded.specs == branched.specs
    for other in [*others, loaded]:
        assert torch.equal(other.all_exits(x), expected)
    with torch.no_grad():
        for parameter in branched.branches.parameters():
            parameter.mul_(2)
    for other in [*others, loaded]:
        assert torch.equal(other.all_exits(x), expected)


def test_the_same_seed_gives_the_same_branch_and_a_confidence_unit_reads_its_logits() -> None:
    x = torch.randn(2, 3, 32, 32)
    branched = ee.augment(
        fresh().unload(), ["layer1.0"], branch=ee.BranchSpec("shortcut", True, {"budget": 0.5}), sample=x
    )
    answer = branched.engine.answers(x)[0][0]
    assert answer.confidence is not None
    assert answer.confidence.shape == (2,)
    assert torch.equal(fresh(budget=0.5).all_exits(x)[0], answer.logits)
