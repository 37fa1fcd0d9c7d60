"""Calibrate: records of held-out data, calibrators that choose thresholds on them, the frontier, risk control."""
