"""Decide who leaves where: scores, thresholds, records of held-out data, calibrators, the frontier."""

from ee_surgery.policies import pixel_scores  # noqa: F401  (its scores register themselves)
