"""Early exits on street scenes: every pixel of CamVid labelled, a frozen original, exits against smaller networks.

    python -m recipes.camvid                                # ESPNetv2-1.5, trained on Cityscapes
    python -m recipes.camvid --network espnet               # ESPNet, trained on CamVid
    python -m recipes.camvid --smoke --out DIR --threads 1  # a few pictures, one epoch

Branches learn from two drives; the third calibrates, and test is reported. Of the test pictures, 62 are of a drive that
trained the branches, 171 are of one that nothing here has seen. `python -m benchmarks.camvid` measures time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ee_surgery as ee
from recipes.data import StreetScenes, camvid, weights
from recipes.espnet import ESPNet, ESPNetv2, OnCamVid

DRIVES = ("0016E5", "0006R0", "0001TP")
HELD_OUT = "0006R0"
"""The drive that calibrates."""
SIZE = (360, 480)
EXITS = {
    "espnet": ["encoder.level3.1", "encoder.level3.4"],
    "espnetv2_150": ["net.base_net.level4.2", "net.base_net"],
}


class Pictures(Dataset[Any]):
    """Normalized pictures, and maps of 11 classes where labels are given; cropped, scaled and mirrored in training."""

    def __init__(self, scenes: StreetScenes, mean: Tensor, std: Tensor, labels: bool, training: bool = False) -> None:
        self.scenes, self.mean, self.std, self.labels, self.training = scenes, mean, std, labels, training

    def __len__(self) -> int:
        return len(self.scenes.images)

    def __getitem__(self, i: int) -> Any:
        image, label = self.scenes.images[i].float() / 255, self.scenes.labels[i].long()
        if self.training:
            image, label = _varied(image, label)
        image = (image - self.mean) / self.std
        return (image, label) if self.labels else image


def _varied(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0), ratio=(1.1, 1.6), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
        ]
    )
    image, label = change(tv_tensors.Image(image), tv_tensors.Mask(label))
    return torch.as_tensor(image), torch.as_tensor(label)


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A pretrained network on CamVid's classes, with mean and standard deviation of its inputs."""
    if name == "espnet":
        model, (tensors, mean, std) = ESPNet(), weights("camvid_espnet")
    else:
        width = name.rpartition("_")[2]
        model, (tensors, mean, std) = ESPNetv2(width), weights(f"cityscapes_espnetv2_{width}")
    model.load_state_dict(tensors)
    return (model if name == "espnet" else OnCamVid(model)).eval(), mean, std


def scenes(split: str, few: int | None, drives: list[str] | None = None) -> StreetScenes:
    """A split, of some drives."""
    found = camvid(split)
    kept = [i for i, drive in enumerate(found.drives) if drives is None or drive in drives][:few]
    return StreetScenes(found.images[kept], found.labels[kept], [found.drives[i] for i in kept])


def main() -> None:
    """Train, record, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(EXITS), default="espnetv2_150")
    parser.add_argument(
        "--without-labels", action="store_true", help="learn the original's maps, and calibrate by them"
    )
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="channels of the branches; 0 for 5 %% of the MACs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few, labels = 4 if options.smoke else None, not options.without_labels
    model, mean, std = network(options.network)
    folder = options.out / options.network
    branched, about = trained(options, model, mean, std, folder)
    held_out = Pictures(scenes("train", few, [HELD_OUT]), mean, std, labels)
    test = Pictures(scenes("test", few), mean, std, labels=True)
    for name, data in (("calibrating", held_out), ("test", test)):
        records = ee.record(branched, data, batch_size=4)
        records.save(folder / f"{name}.safetensors")
        alone = zip((*records.exits, "original"), records.accuracies, strict=True)
        print(f"{name}, alone:", ", ".join(f"{exit} {value:.2%}" for exit, value in alone))
    ee.calibrate(branched, held_out, batch_size=4)
    print(branched.frontier)
    print(f"Original {branched.receipt()}.")
    branched.save_pretrained(folder / "adapter")
    (folder / "training.json").write_text(json.dumps(about))
    print(f"python -m benchmarks.camvid {folder} times it, beside smaller networks")


def trained(
    options: argparse.Namespace, model: nn.Module, mean: Tensor, std: Tensor, folder: Path
) -> tuple[ee.EarlyExitModel, dict[str, Any]]:
    """The branched model, and how it was trained."""
    few, epochs = (4, 1) if options.smoke else (None, options.epochs)
    learning = [drive for drive in DRIVES if drive != HELD_OUT]
    labels = not options.without_labels
    train = Pictures(scenes("train", few, learning), mean, std, labels, training=True)
    spec = ee.BranchSpec("dense", options={"width": options.width, "depth": 3, "stride": 4})
    sample = torch.zeros(2, 3, *SIZE)
    branched = ee.augment(model, EXITS[options.network], branch=spec, sample=sample, seed=options.seed)
    config = ee.TrainConfig(
        epochs=epochs,
        batch_size=4,
        lr=2e-3,
        weight_decay=1e-3,
        distill=0.0 if labels else 1.0,
        temperature=1.0,
        ema=0.98,
        teach="labels" if labels else "original",
        validation=0,
        mixed_precision="auto",
        seed=options.seed,
        checkpoint_dir=None if options.smoke else str(folder / "training"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained = ee.train(branched, train, config)
    return branched, {
        "network": options.network,
        "labels": labels,
        "epochs": epochs,
        "seed": options.seed,
        "exits": branched.exits,
        "branch_macs": [macs / branched.trunk_macs[-1] for macs in branched.branch_macs],
        "minutes": sum(epoch.seconds for epoch in trained.epochs) / 60,
    }


if __name__ == "__main__":
    main()
