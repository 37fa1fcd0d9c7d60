"""Branches: small networks from the features at an exit to logits, and optionally a confidence."""

from ee_surgery.branches import chained, conv, dense, pooled, residual, shortcut  # noqa: F401  (their classes register themselves)
from ee_surgery.branches.auto import resolve
from ee_surgery.branches.base import BRANCHES, Branch, BranchSpec, ExitLogits, known

__all__ = ["BRANCHES", "Branch", "BranchSpec", "ExitLogits", "known", "resolve"]
