"""Shortcut branches on a pretrained CIFAR-10 ResNet-56 against smaller networks.

    python -m recipes.cifar10_shortcuts
    python -m recipes.cifar10_shortcuts --smoke    a few images, one epoch

Two exits after the first blocks, whose branches are copies of every fourth or eighth later block. Thresholds are
chosen on 5,000 test images and reported on the other 5,000, and the other way round, over 10 random splits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import ee_surgery as ee
from recipes.cifar10_resnet56 import Requests, arguments, network, pictures, report

EXITS = {"layer1.0": "layer2 layer3", "layer1.1": "layer2.4 layer2 layer3.4 layer3"}
"""Blocks that each branch keeps, besides those that change the size of the maps."""
SIZE = 128  # of a batch
CONFIG = ee.TrainConfig(
    lr=3e-3,
    weight_decay=5e-3,
    distill_from=0.7,  # from there on, the whole original runs
    cutmix=1.0,
    mixed_precision="auto",
    validation=0,
)
REQUESTS: Requests = {
    "drop 0.3 points": {"max_accuracy_drop": 0.003},
    "drop 0.5 points": {"max_accuracy_drop": 0.005},
    "drop 0.78 points": {"max_accuracy_drop": 0.0078},
    "drop 1 point": {"max_accuracy_drop": 0.01},
    "drop 1.66 points": {"max_accuracy_drop": 0.0166},
    "drop 2 points": {"max_accuracy_drop": 0.02},
    "budget 0.5": {"budget": 0.5},
    "budget 0.4": {"budget": 0.4},
}
"""Including the drops of the static ResNet-32 and ResNet-20."""


def main() -> None:
    """Train, record, report."""
    options = arguments(__doc__, Path("runs/cifar10_shortcuts"), epochs=36)
    images, mean, std = pictures("train", options.few)
    original = network(56).to(memory_format=torch.channels_last)
    branches = [ee.BranchSpec("shortcut", options={"blocks": blocks}) for blocks in EXITS.values()]
    branched = ee.augment(original, list(EXITS), branch=branches, sample=torch.zeros(2, 3, 32, 32), seed=options.seed)
    folder = str(options.out / "training")
    config = replace(CONFIG, epochs=options.epochs, seed=options.seed, checkpoint_dir=folder)
    trained = ee.train(branched, ee.AugmentedBatches(*images, mean=mean, std=std, batch_size=SIZE), config)
    trained.model.to(memory_format=torch.contiguous_format)  # like the networks it is compared with
    report(trained, REQUESTS, options)


if __name__ == "__main__":
    main()
