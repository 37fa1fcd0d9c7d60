"""Which score tells right from wrong: how well, and which one calibration takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.nn.functional import one_hot

import ee_surgery as ee
from ee_surgery.calibration.search import best_score
from tests.search.test_exit_search import answers


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60), levels=st.integers(1, 5))
def test_auroc_is_that_of_scikit_learn_with_ties(seed: int, n: int, levels: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randint(levels, (3, n, 4)).float()
    records = ee.ExitRecords(("a", "b"), logits, (1, 2, 4), (0, 0), torch.randint(4, (n,)))
    for k, auroc in enumerate(ee.failure_auroc(records)):
        right = records.correct[k]
        if right.all() or not right.any():
            assert auroc is None
        else:
            assert auroc == pytest.approx(roc_auc_score(right, records.scores("max_prob")[k]))


def lying(n: int = 2000) -> ee.ExitRecords:
    """Two exits whose largest probability says nothing, while the margin over the second class does."""
    torch.manual_seed(0)
    labels = torch.randint(3, (n,))
    right = torch.rand(n) < 0.7
    answer = torch.where(right, labels, (labels + 1) % 3)
    top = torch.full((n,), 0.5)
    second = torch.where(right, 0.25, 0.49) + 0.005 * torch.rand(n)
    p = torch.empty(n, 3).scatter_(1, answer[:, None], top[:, None])
    p.scatter_(1, ((answer + 1) % 3)[:, None], second[:, None]).scatter_(
        1, ((answer + 2) % 3)[:, None], (0.5 - second)[:, None]
    )
    return ee.ExitRecords(("a",), torch.stack([p.log(), 9.0 * one_hot(labels, 3)]), (20, 100), (1,), labels)


def test_calibration_takes_another_score_only_where_it_is_clearly_better() -> None:
    easy = answers(0, [0.6, 0.9, 1.3], [30, 60], n=1000)
    assert {point.score for point in best_score(easy)} == {"max_prob"}
    records = lying()
    assert ee.failure_auroc(records)[0] == pytest.approx(0.5, abs=0.03)
    assert ee.failure_auroc(records, "margin")[0] == 1.0
    frontier = ee.Frontier.of(records, best_score(records))
    assert {str(point.score) for point in frontier} != {"max_prob"}
    assert frontier.at(max_accuracy_drop=0.0).macs_fraction < 0.6
    assert ee.Frontier.search(records).at(max_accuracy_drop=0.0).macs_fraction > 0.9
    assert frontier.exit_aurocs[0] == pytest.approx(1.0, abs=0.02)
    assert ee.Frontier.from_dict(frontier.to_dict()).exit_aurocs == frontier.exit_aurocs
    assert "AUROC of right against wrong answers at each branch: 1.000" in " ".join(
        str(frontier.table().caption).split()
    )
