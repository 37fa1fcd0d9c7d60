"""Calibrate: records of held-out data, methods that choose thresholds on them, the frontier, risk control."""
