"""The promises of docs/design.md, for every model of the zoo."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.calibration.budget import between
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.segments import compact
from ee_surgery.policies.exit_costs import exit_costs
from tests.strategies import Registered, branches, losses, registered, scores
from tests.zoo import BY_NAME, EVERY, Entry, branched, original, small

SCORES = ["max_prob", "margin", "entropy", "patience"]


@pytest.mark.parametrize("entry", EVERY)
def test_never_exit_equals_the_original_bit_for_bit(entry: Entry) -> None:
    model, x = branched(entry.name), entry.sample(2)
    model.operate(None)
    with torch.no_grad():
        expected, seen = original(entry.name)(x), model(x)
    assert type(seen) is type(expected)
    logits = model.engine.backbone.logits
    assert torch.equal(logits(seen), logits(expected))


@pytest.mark.parametrize("entry", EVERY)
def test_receipt_is_unchanged_after_every_verb(entry: Entry) -> None:
    model, x = branched(entry.name), entry.sample(4)
    data = [(x, torch.arange(4) % 10)] * 2
    before = {name: parameter.clone() for name, parameter in model.branches.named_parameters()}
    flags = [module.training for module in model.backbone.modules()]
    ee.train(model, data, ee.TrainConfig(epochs=1, progress=False))
    assert any(not torch.equal(before[name], p) for name, p in model.branches.named_parameters())
    with torch.no_grad():  # give the shared model its weights back
        for name, parameter in model.branches.named_parameters():
            parameter.copy_(before[name])
    ee.calibrate(model, data)
    model.operate(thresholds=0.5)
    model.predict(x)
    ee.evaluate(model, data)
    model.operate(None)
    model.frontier = None
    receipt = model.receipt()
    assert receipt.unchanged, receipt
    assert len(receipt.before) == len(list(model.engine.backbone.tensors()))
    assert [module.training for module in model.backbone.modules()] == flags


@pytest.mark.parametrize("batch", [1, 2, 7, 128])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["cifar-resnet20", "test_vit", "hf-Swin"])
def test_routed_equals_replayed(name: str, score: str, batch: int) -> None:
    _check(name, score, batch, seed=batch, quantile=0.5)


@pytest.mark.parametrize("entry", EVERY)
def test_routed_equals_replayed_on_the_zoo(entry: Entry) -> None:
    for quantile in (0.0, 0.4, 1.0):
        _check(entry.name, "max_prob", 5, seed=3, quantile=quantile)


@given(quantile=st.floats(0, 1), batch=st.integers(1, 12), seed=st.integers(0, 100), score=st.sampled_from(SCORES))
def test_routed_equals_replayed_property(quantile: float, batch: int, seed: int, score: str) -> None:
    _check("cifar-resnet20", score, batch, seed, quantile)


def _check(name: str, score: str, batch: int, seed: int, quantile: float) -> None:
    """Thresholds at a quantile of the very batch, so that it is split; halfway between two scores, for float noise."""
    model, x = branched(name), BY_NAME[name].sample(batch, seed)
    records = ee.record(model, [x], batch_size=batch)
    thresholds = []
    for row in records.scores(score).double():
        ranked = row.sort().values
        at = min(int(quantile * batch), batch)
        low = ranked[at - 1] if at > 0 else ranked[0] - 1
        high = ranked[at] if at < batch else ranked[-1] + 1
        if high - low < 1e-5 and at < batch:  # too close for two ways of computing the same
            low = ranked[ranked < high - 1e-5].max() if (ranked < high - 1e-5).any() else ranked[0] - 1
            high = ranked[ranked > low + 1e-6].min()
        thresholds.append(((low + high) / 2).item())
    policy = ee.ThresholdPolicy(tuple(thresholds), score)
    replay = records.replay(policy)
    model.operate(thresholds=thresholds, score=score)
    output = model.predict(x)
    model.operate(None)
    assert output.exit_index.tolist() == replay.exit_index.tolist()
    expected = records.logits.gather(0, replay.exit_index.view(1, -1, 1).expand(1, -1, records.logits.shape[2]))[0]
    torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-4)
    assert output.macs.double().tolist() == replay.macs.tolist()
    visits = policy.visits(model.branches.chained)
    costs = exit_costs(model.trunk_macs, model.branch_macs, visits)
    assert output.macs.tolist() == [costs[k] for k in output.exit_index.tolist()]


@settings(max_examples=15)
@given(
    drawn=st.tuples(scores(), branches(), losses()),
    closed=st.sets(st.integers(0, 2), min_size=1, max_size=2),
    quantile=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_routed_equals_replayed_for_what_users_register_when_exits_are_closed(
    drawn: tuple[Registered, ...], closed: set[int], quantile: float, seed: int
) -> None:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with registered(*drawn) as (score, branch, loss):
        model = ee.attach(small(), ee.place(small(), ["0", "1", "2"]), branch, seed=seed)
        config = ee.TrainConfig(epochs=1, lr=0.1, objective=loss, distill=0, validation=0, progress=False)
        ee.train(model, [(x, torch.arange(16) % 4)], config)
        records = ee.record(model, [x], batch_size=16)
        rows = records.scores(score)
        # thresholds that no score is near: two ways of computing the same differ by float noise
        rank, ranked = 1 + int(15 * quantile), rows.sort(descending=True).values.double().numpy()
        taus = [math.inf if k in closed else between(row, rank) for k, row in enumerate(ranked)]
        near = (rows - torch.tensor(taus)[:, None]).abs().amin(0) < 1e-6
        policy = ee.ThresholdPolicy(tuple(taus), score)
        replay = records.replay(policy)
        model.operate(thresholds=taus, score=score)
        output = model.predict(x)
        assert (output.exit_index == replay.exit_index)[~near].all()
        answers = records.logits[replay.exit_index, torch.arange(16)]
        torch.testing.assert_close(output.logits[~near], answers[~near], rtol=1e-3, atol=1e-4)
        assert output.macs.double().tolist() == replay.macs.tolist() or near.any()
        assert model.receipt().unchanged


@pytest.mark.parametrize("name", ["cifar-resnet20", "test_vit", "hrnet_w18_small", "hf-Beit"])
def test_all_leave_first_and_none_leaves(name: str) -> None:
    model, x = branched(name), BY_NAME[name].sample(4)
    exits = model.all_exits(x)
    model.operate(thresholds=-1.0)
    first = model.predict(x)
    assert first.exit_index.tolist() == [0] * 4
    torch.testing.assert_close(first.logits, exits[0])
    model.operate(thresholds=2.0)
    last = model.predict(x)
    assert last.exit_index.tolist() == [len(model.exits)] * 4
    torch.testing.assert_close(last.logits, exits[-1])
    assert last.score.isnan().all()
    model.operate(None)


@pytest.mark.parametrize("entry", EVERY)
def test_permuting_and_splitting_a_batch_permutes_and_splits_the_results(entry: Entry) -> None:
    model, x = branched(entry.name), entry.sample(6)
    scores = ee.record(model, [x]).scores("max_prob")
    model.operate(thresholds=[_widest_gap(row) for row in scores])
    whole = model.predict(x)
    order = torch.randperm(6)
    permuted = model.predict(x[order])
    assert permuted.exit_index.tolist() == whole.exit_index[order].tolist()
    torch.testing.assert_close(permuted.logits, whole.logits[order], rtol=1e-3, atol=1e-4)
    halves = [model.predict(half) for half in x.split([1, 5])]
    assert torch.cat([half.exit_index for half in halves]).tolist() == whole.exit_index.tolist()
    torch.testing.assert_close(torch.cat([half.logits for half in halves]), whole.logits, rtol=1e-3, atol=1e-4)
    model.operate(None)


def _widest_gap(scores: torch.Tensor) -> float:
    """A threshold that float noise does not reach."""
    ranked = scores.sort().values
    at = int(ranked.diff().argmax())
    return ranked[at : at + 2].mean().item()


@pytest.mark.parametrize("entry", EVERY)
def test_save_and_load_give_the_same_logits_and_exits(entry: Entry, tmp_path: Path) -> None:
    model, x = branched(entry.name), entry.sample(5)
    scores = ee.record(model, [x]).scores("max_prob")
    model.operate(thresholds=[_widest_gap(row) for row in scores])
    again = ee.from_pretrained(model.save_pretrained(tmp_path), original(entry.name))
    expected, seen = model.predict(x), again.predict(x)
    model.operate(None)
    assert seen.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-5, atol=1e-6)


@given(done=st.lists(st.booleans(), min_size=1, max_size=32), dim=st.integers(0, 2))
def test_compact_keeps_order_in_any_dimension(done: list[bool], dim: int) -> None:
    rows = torch.arange(len(done)).view(-1, 1, 1).expand(-1, 2, 3).movedim(0, dim)
    keep = (~torch.tensor(done)).nonzero().squeeze(1)
    (left,) = compact((rows,), (Axis(dim),), keep)
    assert left.movedim(dim, 0)[:, 0, 0].tolist() == [i for i, gone in enumerate(done) if not gone]


def test_compact_keeps_channels_last() -> None:
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (left,) = compact((x,), (Axis(0),), torch.tensor([2, 0]))
    assert torch.equal(left, x[[2, 0]])
    assert left.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_with_logits_that_are_not_finite_never_leaves_early() -> None:
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(4)
    x[1] = torch.nan
    x[2] = torch.inf
    model.operate(thresholds=0.0)
    output = model.predict(x)
    assert output.exit_index.tolist() == [0, len(model.exits), len(model.exits), 0]
    assert model.predict(x[1:2]).exit_index.tolist() == [len(model.exits)]
    model.operate(None)


def test_the_original_in_train_mode_is_used_in_eval_mode_and_left_in_train_mode() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BY_NAME["cifar-resnet20"].make()
    x = BY_NAME["cifar-resnet20"].sample(4)
    expected = model.eval()(x)
    model.train()
    model_with_exits = ee.augment(model, 2, sample=x[:2])
    model_with_exits.train()
    assert torch.equal(model_with_exits(x), expected)
    assert all(module.training for module in model.modules())
    assert model_with_exits.receipt().unchanged
