"""Losses: the papers' oracles, and stability."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.branches import ExitLogits
from ee_surgery.training.objectives import Answers, exit_weights, mixture

CONFIG = ee.TrainConfig(cost_weight=0.7)
COSTS = torch.tensor([0.3, 0.6, 1.0])


def answers(confidences: list[float] | None, n: int = 6, classes: int = 4) -> Answers:
    g = torch.Generator().manual_seed(0)
    exits = [
        ExitLogits(torch.randn(n, classes, generator=g), None if confidences is None else torch.full((n,), u))
        for u in (confidences if confidences is not None else [0.0, 0.0])
    ]
    labels = torch.randint(classes, (n,), generator=g)
    return Answers(exits, torch.randn(n, classes, generator=g), labels, COSTS[-len(exits) - 1 :])


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


def test_extreme_logits_keep_loss_and_gradient_finite() -> None:
    a = answers([0.0, 0.0])
    wild = [ExitLogits((e.logits * 1e4).requires_grad_(), (torch.full((6,), 1e4)).requires_grad_()) for e in a.exits]
    for name in ee.OBJECTIVES:
        loss = ee.OBJECTIVES[name](a._replace(exits=wild), CONFIG)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(e.logits.grad).all() for e in wild if e.logits.grad is not None)


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


def test_soft_labels_of_one_class_equal_hard_labels() -> None:
    a = answers([0.1, 0.2])
    soft = a._replace(labels=F.one_hot(a.labels, 4).float())
    for name in ee.OBJECTIVES:
        torch.testing.assert_close(ee.OBJECTIVES[name](a, CONFIG), ee.OBJECTIVES[name](soft, CONFIG))


def test_weights_sum_to_one() -> None:
    assert exit_weights("uniform", 4).sum() == 1
    assert exit_weights("linear", 3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert exit_weights((1.0, 3.0), 2).tolist() == [0.25, 0.75]
    for bad in (("steep"), (1.0,), (-1.0, 2.0), (0.0, 0.0)):
        with pytest.raises(ee.ConfigError, match="exit_weights"):
            exit_weights(bad, 2)


def test_cost_aware_losses_ask_for_confidence_units() -> None:
    with pytest.raises(ee.ConfigError, match="confidence unit"):
        ee.OBJECTIVES["cumulative"](answers(None), CONFIG)


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"distill": 1.5}, {"lr": 0}, {"validation": 1.0}, {"optimizer": "adam2"}, {"teach": "me"}],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ee.ConfigError, match=next(iter(bad))):
        ee.TrainConfig(**bad)  # pyright: ignore[reportArgumentType]
