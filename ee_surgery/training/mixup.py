"""CutMix and Mixup: pictures and labels of a batch mixed with each other."""

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
    """Mixes the pictures of a share of all batches, in pairs, and their labels as much.

    The original answers to the mixed pictures, too: what it says of them is what `distill` teaches.

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
            way(alpha=alpha, num_classes=classes + 1)  # the last class stands for ignored samples
            for way, alpha in ((v2.CutMix, config.cutmix), (v2.MixUp, config.mixup))
            if alpha > 0
        ]
        if self.ways:
            require("Mixing pictures (cutmix=, mixup=)", self.tasks, task)

    def __call__(self, inputs: Inputs, labels: Tensor | None) -> tuple[Inputs, Tensor | None]:
        """Inputs as they came or mixed, and class probabilities (B, C); no labels stay no labels.
        What is mixed with an ignored sample is ignored.

        Raises:
            DataError: the inputs hold no pictures, or labels are probabilities already.
        """
        if not self.ways:
            return inputs, labels
        named = {"": inputs} if isinstance(inputs, Tensor) else inputs
        name, pictures = next(((n, x) for n, x in named.items() if isinstance(x, Tensor) and x.ndim == 4), ("", None))
        if pictures is None or (labels is not None and labels.ndim != 1):
            raise DataError("cutmix= and mixup= need pictures (B, C, H, W) and class numbers (B,) to mix.")
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
        # what is mixed with an ignored sample is ignored: a row of zeros
        return inputs, mixed[:, :-1] * (mixed[:, -1:] == 0)
