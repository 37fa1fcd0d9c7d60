"""Whole-batch augmentation: every image is a window of itself, and labels stay with their images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ee_surgery as ee


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 9), channels=st.integers(1, 3), height=st.integers(1, 6), width=st.integers(1, 6),
    pad=st.integers(0, 3), mirror=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_image_becomes_a_window_of_itself(
    n: int, channels: int, height: int, width: int, pad: int, mirror: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8)
    data = ee.AugmentedBatches(images, None, batch_size=1, pad=pad, mirror=mirror, mean=0.5, std=2.0)
    padded = F.pad(images, (pad,) * 4)
    for image, varied in zip(images, data.vary(images), strict=True):
        found = ((varied * 2 + 0.5) * 255).round().to(torch.uint8)
        row = padded[(images == image).flatten(1).all(1).nonzero()[0, 0]]
        windows = [row[:, y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        assert any(torch.equal(found, w) or (mirror and torch.equal(found, w.flip(2))) for w in windows)


def test_a_pass_shows_every_image_once_with_its_label() -> None:
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    data = ee.AugmentedBatches(images, torch.arange(10), batch_size=3, pad=0)
    assert len(data) == 3
    passes = [[*data], [*data]]
    for batches in passes:
        shown = torch.cat([labels for _, labels in batches])
        assert len(shown.unique()) == 9  # one image is left out
        for x, labels in batches:
            assert torch.equal(x[:, 0, 0, 0], labels.float())
    assert not torch.equal(passes[0][0][1], passes[1][0][1])
    assert len([*ee.AugmentedBatches(images, None, batch_size=3, steps=2)]) == 2


def test_bad_images_labels_and_numbers_are_refused() -> None:
    images = torch.zeros(4, 3, 2, 2)
    for wrong, message in (
        (lambda: ee.AugmentedBatches(images[0], None), "images must be"),
        (lambda: ee.AugmentedBatches(images, torch.zeros(3)), "4 images and 3 labels"),
        (lambda: ee.AugmentedBatches(images, None), "no batch of 128"),
    ):
        with pytest.raises(ee.DataError, match=message):
            wrong()
    for options in ({"pad": -1}, {"mean": [0.0, 1.0]}, {"std": 0.0}, {"mirror": 1}, {"steps": 0}):
        with pytest.raises(ee.ConfigError, match=next(iter(options))):
            ee.AugmentedBatches(images, None, batch_size=2, **options)  # pyright: ignore[reportArgumentType]
