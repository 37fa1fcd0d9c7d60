"""Decide who leaves where: scores, thresholds, records of held-out data, calibrators, the frontier."""
