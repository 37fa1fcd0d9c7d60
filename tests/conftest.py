from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from recipes import data
from tests.hub_server import hub as hub  # a fixture, for every test file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "200"  # rich breaks lines at the width of a terminal, and there is none
torch.set_num_threads(1)  # two busy processes on few cores slow each other down badly
settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar_weights() -> None:
    """Skip where the pretrained networks are absent."""
    if not (data.folder() / "weights" / "cifar10_resnet56.safetensors").exists():
        pytest.skip(f"pretrained networks not found in {data.folder()}; set EE_SURGERY_DATA")
