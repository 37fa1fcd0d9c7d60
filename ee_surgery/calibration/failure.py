"""How well an exit's score tells its right answers from its wrong ones: what early exit lives on."""

from __future__ import annotations

from scipy.stats import rankdata

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.policies.scores import FittedScore


def failure_auroc(records: ExitRecords, score: str | FittedScore | None = None) -> list[float | None]:
    """Of each branch, the chance that a right answer has a higher score than a wrong one, K - 1 numbers in [0, 1].

    0.5 is guessing. Unlike calibration errors, it sees how samples are ranked, and so goes with the cost saved at an
    accuracy (Kubaty et al., arXiv:2508.21495). None where all answers of a branch are right, or all are wrong.
    """
    score = records.task.default_score if score is None else score
    found: list[float | None] = []
    for row, right in zip(records.scores(score).double().numpy(), records.correct[:-1].numpy(), strict=True):
        hits = int(right.sum())
        pairs = hits * (len(right) - hits)
        above = rankdata(row)[right].sum() - hits * (hits + 1) / 2  # pairs in which the right one is higher, ties half
        found.append(float(above / pairs) if pairs else None)
    return found
