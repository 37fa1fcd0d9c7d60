"""Requests in, answers out: samples of many requests share batches, stage by stage."""
