"""A model that is served, and its worker held between two batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ee_surgery as ee
from ee_surgery.serving.routes import _Routed
from tests.serving.test_engine import Held, split
from tests.zoo import two_exits


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(monkeypatch, _Routed)
    yield found
    found.go_on.set()


@pytest.fixture
def model() -> ee.EarlyExitModel:
    found = two_exits()
    split(found, torch.randn(64, 3, 16, 16))
    return found
