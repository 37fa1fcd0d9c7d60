"""Measure: record and calibrate a branched model, evaluate it, compare it with smaller models, time it."""
