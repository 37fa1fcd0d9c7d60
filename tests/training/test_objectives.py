"""Losses: the papers' oracles, and stability."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.branches import ExitLogits
from ee_surgery.training.objectives import Answers, exit_weights, mixture, survivor_weights

CONFIG = ee.TrainConfig(cost_weight=0.7)
COSTS = torch.tensor([0.3, 0.6, 1.0])
COST_AWARE = {"recursive", "cumulative", "normalized", "tagged"}


def answers(confidences: list[float] | None, n: int = 6, classes: int = 4) -> Answers:
    g = torch.Generator().manual_seed(0)
    exits = [
        ExitLogits(torch.randn(n, classes, generator=g), None if confidences is None else torch.full((n,), u))
        for u in (confidences if confidences is not None else [0.0, 0.0])
    ]
    labels = torch.randint(classes, (n,), generator=g)
    return Answers(exits, torch.randn(n, classes, generator=g), labels, COSTS[-len(exits) - 1 :])


def joint(a: Answers) -> Answers:
    """The same where the original learns, too."""
    return a._replace(original=a.original.clone().requires_grad_())


def test_nobody_confident_gives_the_originals_loss_and_full_cost() -> None:
    a = answers([-200.0, -200.0])
    expected = F.cross_entropy(a.original, a.labels) + 0.7
    assert ee.OBJECTIVES["recursive"](a, CONFIG).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_certain_first_exit_gives_its_loss_and_cost() -> None:
    a = answers([200.0, 0.0])
    expected = F.cross_entropy(a.exits[0].logits, a.labels) + 0.7 * 0.3
    assert ee.OBJECTIVES["recursive"](a, CONFIG).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cumulative_without_exits_is_the_originals_loss_and_lambda() -> None:
    a = answers([])
    expected = F.cross_entropy(a.original, a.labels) + 0.7
    assert ee.OBJECTIVES["cumulative"](a, CONFIG).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mixture_equals_plain_probabilities() -> None:
    a = answers([0.4, -1.0])
    log_p, costs = mixture(a)
    p, cost = torch.softmax(a.original, -1), torch.ones(6)
    for k in (1, 0):
        c = torch.sigmoid(a.exits[k].confidence)
        p = c[:, None] * torch.softmax(a.exits[k].logits, -1) + (1 - c[:, None]) * p
        cost = c * COSTS[k] + (1 - c) * cost
        torch.testing.assert_close(log_p[k].exp(), p)
        torch.testing.assert_close(costs[k], cost)
    torch.testing.assert_close(log_p[0].exp().sum(-1), torch.ones(6))


def test_cumulative_is_the_sum_of_the_recursions_from_every_exit() -> None:
    a = answers([0.4, -1.0])
    later = Answers(a.exits[1:], a.original, a.labels, a.costs[1:])
    last = Answers([], a.original, a.labels, a.costs[2:])
    parts = sum(ee.OBJECTIVES["recursive"](part, CONFIG) for part in (a, later, last))
    torch.testing.assert_close(ee.OBJECTIVES["cumulative"](a, CONFIG), parts)


@pytest.mark.parametrize("survivor", [None, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("units", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("name", ee.OBJECTIVES)
def test_extreme_logits_keep_loss_and_gradient_finite(name: str, units: float, survivor: float | None) -> None:
    a = answers([0.0, 0.0])
    wild = [ExitLogits((e.logits * 1e4).requires_grad_(), torch.full((6,), units).requires_grad_()) for e in a.exits]
    learned = (a.original * 1e4).requires_grad_()
    loss = ee.OBJECTIVES[name](a._replace(exits=wild, original=learned), replace(CONFIG, survivor=survivor))
    loss.backward()
    assert torch.isfinite(loss)
    everything = [learned, *(tensor for e in wild for tensor in (e.logits, e.confidence))]
    assert all(torch.isfinite(tensor.grad).all() for tensor in everything if tensor.grad is not None)


def test_kd_is_zero_for_a_perfect_student_and_reads_no_labels() -> None:
    a = answers(None)
    perfect = a._replace(exits=[ExitLogits(a.original + 3.0)] * 2, labels=torch.full((6,), -100))
    assert ee.OBJECTIVES["kd"](perfect, CONFIG).item() == pytest.approx(0, abs=1e-6)
    assert ee.OBJECTIVES["kd"](a, CONFIG) > 0


def test_kd_equals_its_definition() -> None:
    a = answers(None)
    t = CONFIG.temperature
    p = torch.softmax(a.original / t, -1)
    expected = sum(t * t * (p * (p.log() - torch.log_softmax(e.logits / t, -1))).sum(-1).mean() for e in a.exits)
    torch.testing.assert_close(ee.OBJECTIVES["kd"](a, CONFIG), expected)


@pytest.mark.parametrize("name", ee.OBJECTIVES)
def test_soft_labels_of_one_class_equal_hard_labels(name: str) -> None:
    a = joint(answers([0.1, 0.2]))
    soft = a._replace(labels=F.one_hot(a.labels, 4).float())
    torch.testing.assert_close(ee.OBJECTIVES[name](a, CONFIG), ee.OBJECTIVES[name](soft, CONFIG))


def test_weights_sum_to_one() -> None:
    assert exit_weights("uniform", torch.rand(4)).sum() == 1
    assert exit_weights("linear", COSTS).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert exit_weights((1.0, 3.0), COSTS[:2]).tolist() == [0.25, 0.75]
    for bad in (("steep"), (1.0,), (-1.0, 2.0), (0.0, 0.0)):
        with pytest.raises(ee.ConfigError, match="exit_weights"):
            exit_weights(bad, COSTS[:2])


@given(
    costs=st.lists(st.floats(0.01, 1.2), min_size=1, max_size=12),
    progress=st.floats(0, 1),
    rule=st.sampled_from(["uniform", "linear", "ramp"]),
)
def test_weights_of_every_rule_sum_to_one(costs: list[float], progress: float, rule: str) -> None:
    weights = exit_weights(rule, torch.tensor(costs), progress)
    assert weights.shape == (len(costs),)
    assert (weights > 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_ramp_grows_from_near_nothing_to_the_costs_beside_the_original() -> None:
    costs = torch.tensor([0.15, 0.3, 0.45, 0.9])
    for progress in (0.0, 0.25, 0.98, 1.0):
        raw = torch.tensor([min(c, 0.01 + progress * c) for c in costs.tolist()])
        torch.testing.assert_close(exit_weights("ramp", costs, progress), raw / raw.sum())
        raw = torch.cat([raw, torch.ones(1)])  # the original, where it learns, weighs 1 all the time
        joined = exit_weights("ramp", torch.cat([costs, torch.ones(1)]), progress)
        torch.testing.assert_close(joined, raw / raw.sum())
    torch.testing.assert_close(exit_weights("ramp", costs, 0.0), torch.full((4,), 0.25))
    torch.testing.assert_close(exit_weights("ramp", costs, 1.0), costs / costs.sum())


def test_weighted_ce_reads_costs_and_progress_of_the_exits_that_learn() -> None:
    a = joint(answers(None))._replace(progress=0.3)
    config = replace(CONFIG, exit_weights="ramp")
    losses = torch.stack([F.cross_entropy(z, a.labels) for z in (a.exits[0].logits, a.exits[1].logits, a.original)])
    raw = torch.tensor([0.01 + 0.3 * 0.3, 0.01 + 0.3 * 0.6, 1.0])
    torch.testing.assert_close(ee.OBJECTIVES["weighted_ce"](a, config), losses @ raw / raw.sum())
    frozen = a._replace(original=a.original.detach())
    torch.testing.assert_close(ee.OBJECTIVES["weighted_ce"](frozen, config), losses[:2] @ raw[:2] / raw[:2].sum())


def test_the_original_learns_only_where_it_has_a_gradient() -> None:
    a = answers(None)
    assert [z is e.logits for z, e in zip(a.learning, a.exits, strict=True)] == [True, True]
    assert len(joint(a).learning) == 3
    assert joint(a).learning[-1].requires_grad
    own = F.cross_entropy(a.original, a.labels)
    branches = sum(F.cross_entropy(e.logits, a.labels) for e in a.exits)
    torch.testing.assert_close(ee.OBJECTIVES["sum_ce"](a, CONFIG), branches)
    torch.testing.assert_close(ee.OBJECTIVES["sum_ce"](joint(a), CONFIG), branches + own)


def test_final_only_teaches_the_original_and_nothing_else() -> None:
    a = answers(None)
    with pytest.raises(ee.ConfigError, match="frozen: use joint=True"):
        ee.OBJECTIVES["final_only"](a, CONFIG)
    learning = [ExitLogits(e.logits.requires_grad_()) for e in a.exits]
    a = joint(a)._replace(exits=learning)
    loss = ee.OBJECTIVES["final_only"](a, replace(CONFIG, survivor=0.5))
    torch.testing.assert_close(loss, F.cross_entropy(a.original, a.labels))
    loss.backward()
    assert all(e.logits.grad is None for e in learning)
    assert a.original.grad is not None


def test_kd_gives_the_original_no_gradient() -> None:
    a = joint(answers(None))
    a.exits[0].logits.requires_grad_()
    ee.OBJECTIVES["kd"](a, CONFIG).backward()
    assert a.original.grad is None
    assert a.exits[0].logits.grad.any()


@pytest.mark.parametrize("name", sorted(COST_AWARE))
def test_cost_aware_losses_ask_for_confidence_units(name: str) -> None:
    with pytest.raises(ee.ConfigError, match="confidence unit"):
        ee.OBJECTIVES[name](answers(None), CONFIG)
    assert set(ee.OBJECTIVES) - COST_AWARE == {"sum_ce", "weighted_ce", "final_only", "kd"}


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"distill": 1.5},
        {"distill_from": -0.1},
        {"survivor": 1.1},
        {"milestones": (0.5, 2.0)},
        {"ensemble_epochs": -1},
        {"temperature": 0},
        {"lr": 0},
        {"validation": 1.0},
        {"optimizer": "adam2"},
        {"schedule": "steps"},
        {"teach": "me"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ee.ConfigError, match=next(iter(bad))):
        ee.TrainConfig(**bad)  # pyright: ignore[reportArgumentType]


# --- normalized (v3) and tagged (v4)


def test_normalized_by_hand() -> None:
    # two samples, two classes; exit 0 answers with probability 3/4 and 1/2 for the truth, the original with 1/2, 4/5
    exit0 = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    last = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    u = torch.tensor([math.log(3.0), 0.0])  # confidences 3/4 and 1/2: mean 5/8
    a = Answers([ExitLogits(exit0, u)], last, torch.tensor([0, 1]), torch.tensor([0.25, 1.0]))
    ce = [-(math.log(0.75) + math.log(0.5)) / 2, -(math.log(0.5) + math.log(0.8)) / 2]
    expected = (0.625 * (ce[0] + 0.7 * 0.25) + 1.0 * (ce[1] + 0.7)) / 1.625
    assert ee.OBJECTIVES["normalized"](a, CONFIG).item() == pytest.approx(expected, rel=1e-5)


def test_normalized_moves_confidence_to_the_cheaper_loss() -> None:
    a = answers([0.0, 0.0])
    units = [torch.zeros(6, requires_grad=True) for _ in range(2)]
    exits = [ExitLogits(a.original, u) for u in units]  # all exits answer alike: only costs differ
    ee.OBJECTIVES["normalized"](a._replace(exits=exits), CONFIG).backward()
    assert (units[0].grad < 0).all()  # descent raises the confidence of the cheapest


def _tagged_by_hand(a: Answers, price: float) -> float:
    """Sample by sample, in plain Python."""
    logits = [*(e.logits for e in a.exits), a.original]
    n = len(a.labels)
    priced = [
        [F.cross_entropy(z[i], a.labels[i]).item() + price * a.costs[k].item() for k, z in enumerate(logits)]
        for i in range(n)
    ]
    tags = [min(range(len(logits)), key=row.__getitem__) for row in priced]
    loss = sum(row[tag] for row, tag in zip(priced, tags, strict=True)) / n
    for k, e in enumerate(a.exits):
        c = torch.sigmoid(e.confidence).tolist()
        here = [-math.log(c[i]) for i in range(n) if tags[i] == k]
        away = [-math.log(1 - c[i]) for i in range(n) if tags[i] != k]
        halves = [sum(half) / len(half) for half in (here, away) if half]
        loss += sum(halves) / len(halves)
    return loss


@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), price=st.sampled_from([0.0, 0.7, 100.0]))
def test_tagged_is_its_definition_and_does_not_depend_on_the_order(seed: int, n: int, price: float) -> None:
    g = torch.Generator().manual_seed(seed)
    exits = [ExitLogits(2 * torch.randn(n, 4, generator=g), torch.randn(n, generator=g)) for _ in range(2)]
    a = Answers(exits, 2 * torch.randn(n, 4, generator=g), torch.randint(4, (n,), generator=g), COSTS)
    config = replace(CONFIG, cost_weight=price)
    loss = ee.OBJECTIVES["tagged"](a, config).item()
    assert loss == pytest.approx(_tagged_by_hand(a, price), rel=1e-4)
    order = torch.randperm(n, generator=g)  # the published tags stayed where the images had been
    shuffled = [ExitLogits(e.logits[order], e.confidence[order]) for e in exits]
    moved = a._replace(exits=shuffled, original=a.original[order], labels=a.labels[order])
    assert ee.OBJECTIVES["tagged"](moved, config).item() == pytest.approx(loss, rel=1e-4)


def test_tagged_teaches_each_sample_where_its_tag_is() -> None:
    strong, weak = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    exit0 = torch.cat([strong, weak]).requires_grad_()
    u = torch.zeros(2, requires_grad=True)
    last = torch.cat([strong, strong]).requires_grad_()
    a = Answers([ExitLogits(exit0, u)], last, torch.tensor([0, 0]), torch.tensor([0.5, 1.0]))
    ee.OBJECTIVES["tagged"](a, replace(CONFIG, cost_weight=0.1)).backward()
    assert exit0.grad[0].any()
    assert not exit0.grad[1].any()
    assert last.grad[1].any()
    assert not last.grad[0].any()
    assert u.grad[0] < 0 < u.grad[1]  # leaves, stays


def test_tagged_weighs_leaving_and_staying_equally_however_rare() -> None:
    strong, weak = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    u = torch.zeros(10, requires_grad=True)
    exit0 = torch.cat([strong, weak.expand(9, 2)])
    a = Answers([ExitLogits(exit0, u)], strong.expand(10, 2), torch.zeros(10, dtype=torch.long), COSTS[1:])
    ee.OBJECTIVES["tagged"](a, replace(CONFIG, cost_weight=0.1)).backward()
    assert u.grad[0].item() == pytest.approx(-u.grad[1:].sum().item(), rel=1e-5)


def test_a_dear_mac_tags_everyone_at_the_first_exit() -> None:
    a = answers([0.4, -1.0])
    loss = ee.OBJECTIVES["tagged"](a, replace(CONFIG, cost_weight=1e4))
    c = [torch.sigmoid(e.confidence[0]) for e in a.exits]
    expected = F.cross_entropy(a.exits[0].logits, a.labels) + 1e4 * 0.3 - c[0].log() - (1 - c[1]).log()
    torch.testing.assert_close(loss, expected)


# --- survivors


@given(seed=st.integers(0, 1000), threshold=st.floats(0, 1), units=st.booleans())
def test_survivor_weights_are_the_chance_to_get_there_scaled_to_mean_one(
    seed: int, threshold: float, units: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    exits = [
        ExitLogits(2 * torch.randn(8, 4, generator=g), torch.randn(8, generator=g) if units else None) for _ in range(3)
    ]
    a = Answers(exits, torch.randn(8, 4, generator=g), torch.zeros(8, dtype=torch.long), torch.linspace(0.25, 1, 4))
    weights = survivor_weights(a, threshold)
    assert weights.shape == (4, 8)
    assert weights[0].tolist() == [1.0] * 8
    torch.testing.assert_close(weights.mean(1), torch.ones(4))
    there = torch.ones(8, dtype=torch.float64)
    for k, e in enumerate(exits):
        torch.testing.assert_close(weights[k].double(), there / there.mean(), rtol=1e-3, atol=1e-5)
        top = torch.softmax(e.logits.double(), -1).max(-1).values
        s = torch.sigmoid(e.confidence.double()) if units else torch.sigmoid((top - threshold) / 0.05)
        there = there * (1 - s)
    torch.testing.assert_close(weights[3].double(), there / there.mean(), rtol=1e-3, atol=1e-5)


def test_samples_that_an_early_exit_is_certain_of_hardly_count_later() -> None:
    a = answers(None, n=8)
    sure = torch.cat([20 * F.one_hot(torch.arange(4), 4).float(), torch.zeros(4, 4)])
    a = a._replace(exits=[ExitLogits(sure), a.exits[1]])
    weights = survivor_weights(a, 0.8)
    assert (weights[1, :4] < 0.05).all()
    torch.testing.assert_close(weights[1, 4:], torch.full((4,), 2.0), atol=0.05, rtol=0)
    losses = [F.cross_entropy(e.logits, a.labels, reduction="none") for e in a.exits]
    expected = losses[0].mean() + (losses[1] * weights[1]).mean()
    torch.testing.assert_close(ee.OBJECTIVES["sum_ce"](a, replace(CONFIG, survivor=0.8)), expected)
    torch.testing.assert_close(expected, losses[0].mean() + losses[1][4:].mean(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", ee.OBJECTIVES)
def test_no_survivor_weights_are_weights_of_one(name: str) -> None:
    a = joint(answers([-200.0, -200.0]))  # nobody leaves: everybody survives
    plain, weighted = (ee.OBJECTIVES[name](a, replace(CONFIG, survivor=s)) for s in (None, 0.5))
    torch.testing.assert_close(plain, weighted)


def test_survivor_weights_carry_no_gradient() -> None:
    a = answers([0.1, 0.2])
    u = [torch.zeros(6, requires_grad=True) for _ in range(2)]
    a = a._replace(exits=[ExitLogits(e.logits.requires_grad_(), c) for e, c in zip(a.exits, u, strict=True)])
    assert not survivor_weights(a, 0.5).requires_grad
    ee.OBJECTIVES["sum_ce"](a, replace(CONFIG, survivor=0.5)).backward()
    assert all(c.grad is None for c in u)


@given(seed=st.integers(0, 1000), name=st.sampled_from([*ee.OBJECTIVES]), survivor=st.sampled_from([None, 0.5]))
def test_the_order_in_a_batch_does_not_matter(seed: int, name: str, survivor: float | None) -> None:
    def loss(rows: Tensor) -> float:
        exits = [ExitLogits(e.logits[rows], e.confidence[rows]) for e in a.exits]
        moved = a._replace(exits=exits, original=a.original[rows], labels=a.labels[rows])
        return ee.OBJECTIVES[name](moved, replace(CONFIG, survivor=survivor)).item()

    g = torch.Generator().manual_seed(seed)
    exits = [ExitLogits(torch.randn(7, 4, generator=g), torch.randn(7, generator=g)) for _ in range(2)]
    original = torch.randn(7, 4, generator=g).requires_grad_()
    a = Answers(exits, original, torch.randint(4, (7,), generator=g), COSTS)
    assert loss(torch.randperm(7, generator=g)) == pytest.approx(loss(torch.arange(7)), rel=1e-4)
