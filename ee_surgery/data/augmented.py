"""Augmentation of whole batches of images in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.checks import count, flag, optional, refuse
from ee_surgery.errors import DataError

Statistics = Tensor | Sequence[float] | float


class AugmentedBatches:
    """Training images in memory, each shifted and mirrored at random, a whole batch at a time.

    One by one, on a processor, that takes longer than a training step of small branches. Every pass draws another order
    and other shifts, from torch's global generator. An incomplete last batch is left out.

    Args:
        images: (N, C, H, W); integers in 0..255 are divided by 255.
        labels: (N, ...), or None: batches are images alone.
        mean: of the normalization, one number or one per channel.
        std: likewise, above 0.
        batch_size: samples per batch.
        pad: pixels of zeros around an image, of which a window of the image's size is cut.
        mirror: flip half of the images left to right.
        steps: batches per pass; by default all that are complete.
    Raises:
        DataError: images of another shape, another number of labels, or fewer images than one batch.
        ConfigError: an invalid number.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        mean: Statistics = 0.0,
        std: Statistics = 1.0,
        batch_size: int = 128,
        pad: int = 4,
        mirror: bool = True,
        steps: int | None = None,
    ) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4:
            refuse("images", "a tensor (N, C, H, W)", images, DataError)
        if labels is not None and len(labels) != len(images):
            raise DataError(f"There are {len(images)} images and {len(labels)} labels.")
        self.images, self.labels = images, labels
        self.batch_size, self.pad = count("batch_size", batch_size), count("pad", pad, low=0)
        self.mirror = flag("mirror", mirror)
        self.mean, self.std = _per_channel("mean", mean, images), _per_channel("std", std, images)
        whole = len(images) // self.batch_size
        if not whole:
            raise DataError(f"{len(images)} images make no batch of {self.batch_size}: lower batch_size.")
        self.steps = min(whole, optional(count)("steps", steps) or whole)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        for rows in torch.randperm(len(self.images)).split(self.batch_size)[: self.steps]:
            images = self.vary(self.images[rows])
            yield images if self.labels is None else (images, self.labels[rows])

    def vary(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as given -> shifted, mirrored and normalized, float32."""
        n, (height, width) = len(images), images.shape[-2:]
        down, right = (torch.randint(0, 2 * self.pad + 1, (n,)) for _ in range(2))
        ys, xs = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
        if self.mirror:
            xs = torch.where((torch.rand(n) < 0.5)[:, None], xs.flip(1), xs)
        padded = F.pad(images, (self.pad,) * 4)
        picked = padded[torch.arange(n)[:, None, None], :, ys[:, :, None], xs[:, None]]  # (n, H, W, C)
        values = picked.permute(0, 3, 1, 2).float()
        if not images.is_floating_point():
            values = values / 255
        return (values - self.mean) / self.std


def _per_channel(name: str, value: Statistics, images: Tensor) -> Tensor:
    found, channels = torch.as_tensor(value, dtype=torch.float32).flatten(), images.shape[1]
    if found.numel() not in (1, channels) or not bool(torch.isfinite(found).all()):
        refuse(name, f"one finite number, or one for each of {channels} channels", value)
    if name == "std" and bool((found <= 0).any()):
        refuse(name, "above 0", value)
    return found.view(-1, 1, 1)
