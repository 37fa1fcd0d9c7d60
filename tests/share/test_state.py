"""The state that travels: no verb loses a field of it, but for what does not hold any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

import ee_surgery as ee
from ee_surgery.share.state import AdapterState

Verb = Callable[[ee.EarlyExitModel, Path], ee.EarlyExitModel]
X = torch.randn(8, 3, 32, 32)


def _base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=32).eval()


@pytest.fixture(scope="module")
def full() -> ee.EarlyExitModel:
    """With something in every field; no verb changes it."""
    branched = ee.augment(_base(), 2, sample=X[:2])
    branched.provenance |= {"training": {"epochs": 3}, "card": {"license": "mit"}, "note": ["by", "hand"]}
    branched.preprocessing = {**(branched.preprocessing or {}), "crop_pct": 0.5}
    branched.processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    branched.operate(ee.calibrate(branched, [(X, torch.arange(8) % 5)])[0])
    ee.evaluate(branched, [(X, torch.arange(8) % 5)])
    branched.rebase()  # its original is a base of its own
    assert all(getattr(branched.state, field.name) for field in fields(AdapterState))
    return branched


def _loaded(branched: ee.EarlyExitModel, folder: Path) -> ee.EarlyExitModel:
    return ee.from_pretrained(branched.save_pretrained(folder / "adapter"), _base(), sample=X[:2], own_base=True)


def _trained(branched: ee.EarlyExitModel, folder: Path) -> ee.EarlyExitModel:
    config = ee.TrainConfig(epochs=1, validation=0, progress=False, distill=0)
    return ee.train(branched, [(X, torch.arange(8) % 5)], config, joint=True).model


VERBS: dict[str, Verb] = {
    "copy": lambda branched, folder: branched.copy(),
    "deepcopy": lambda branched, folder: copy.deepcopy(branched),
    "with_exits": lambda branched, folder: branched.with_exits(branched.exits[:1]),
    "save and load": _loaded,
    "joint training": _trained,
}
MEASURED = {"frontier", "operating_point"}
"""What holds for one set of exits and weights."""
NEW = {"with_exits", "joint training"}
"""Verbs that give others."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_of_the_state_survives(verb: str, full: ee.EarlyExitModel, tmp_path: Path) -> None:
    wanted = full.state.copy()
    after = VERBS[verb](full, tmp_path)
    for field in fields(AdapterState):
        found, expected = getattr(after.state, field.name), getattr(wanted, field.name)
        if field.name in MEASURED and verb in NEW:
            assert found is None, field.name
        elif field.name == "provenance":
            _same_provenance(found, expected, verb)
        elif field.name == "frontier":
            assert [*map(str, found)] == [*map(str, expected)]
        elif field.name == "operating_point":
            assert found.thresholds == expected.thresholds
            assert after.policy == full.policy
        elif field.name == "processor":
            assert found.size == expected.size
        else:
            assert found == expected, field.name
    assert full.state.operating_point == wanted.operating_point  # the model given keeps what it has
    assert full.state.provenance == wanted.provenance


def _same_provenance(found: dict[str, Any], expected: dict[str, Any], verb: str) -> None:
    assert found["note"] == expected["note"]
    assert found["card"] == expected["card"]
    assert ("evaluation" in found) == (verb not in NEW)
    told = found["training"]
    assert told["samples" if verb == "joint training" else "epochs"]


def test_a_copy_has_a_state_of_its_own(full: ee.EarlyExitModel) -> None:
    twin = full.copy()
    twin.provenance["training"]["epochs"] = 9
    twin.operate(None)
    twin.frontier = None
    assert full.provenance["training"] == {"epochs": 3}
    assert full.operating_point is not None
    assert full.frontier is not None
