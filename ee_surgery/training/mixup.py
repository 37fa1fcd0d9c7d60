"""CutMix and Mixup: images and labels of a batch mixed with each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.data.labels import IGNORED
from ee_surgery.errors import DataError
from ee_surgery.task import CLASSIFICATION, Task, TaskNames, require
from ee_surgery.training.config import TrainConfig


class Mixing:
    """Mixes the images of a fraction of all batches in pairs, and their labels accordingly.

    `distill` uses the original's logits for the mixed images.

    Args:
        classes: C.
        task: what the labels are.
    Raises:
        ConfigError: pictures are to be mixed, and labels of the task cannot be.
    Source: CutMix (Yun et al., ICCV 2019, arXiv:1905.04899), Mixup (Zhang et al., ICLR 2018, arXiv:1710.09412).
    """

    tasks: ClassVar[TaskNames] = ("classification",)

    def __init__(self, config: TrainConfig, classes: int, task: Task = CLASSIFICATION) -> None:
        self.share, self.classes, self.ways = config.mix_share, classes, []
        if not config.cutmix and not config.mixup:
            return
        from torchvision.transforms import v2

        self.ways = [
            way(alpha=alpha, num_classes=classes + 1)  # one extra class for ignored samples
            for way, alpha in ((v2.CutMix, config.cutmix), (v2.MixUp, config.mixup))
            if alpha > 0
        ]
        if self.ways:
            require("Mixing pictures (cutmix=, mixup=)", self.tasks, task)

    def __call__(self, inputs: Inputs, labels: Tensor | None) -> tuple[Inputs, Tensor | None]:
        """Inputs, mixed or unchanged, and class probabilities (B, C); None if there are no labels.
        A sample mixed with an ignored one is ignored.

        Raises:
            DataError: the inputs have no images, or labels are already probabilities.
        """
        if not self.ways:
            return inputs, labels
        named = {"": inputs} if isinstance(inputs, Tensor) else inputs
        name, pictures = next(((n, x) for n, x in named.items() if isinstance(x, Tensor) and x.ndim == 4), ("", None))
        if pictures is None or (labels is not None and labels.ndim != 1):
            raise DataError("cutmix= and mixup= need images (B, C, H, W) and class numbers (B,) to mix.")
        numbers = torch.zeros(len(pictures), dtype=torch.long)
        if labels is not None:
            numbers = torch.where(labels == IGNORED, self.classes, labels)
        mixed: Tensor = F.one_hot(numbers, self.classes + 1).float()
        if torch.rand(()) < self.share:
            way = self.ways[int(torch.randint(len(self.ways), ()))]
            pictures, mixed = way(pictures, numbers)
        inputs = pictures if isinstance(inputs, Tensor) else {**inputs, name: pictures}
        if labels is None:
            return inputs, None
        # a sample mixed with an ignored one is ignored: a row of zeros
        return inputs, mixed[:, :-1] * (mixed[:, -1:] == 0)
