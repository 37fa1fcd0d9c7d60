"""Early exits on street scenes: every pixel of CamVid labelled, a frozen original, exits against smaller networks.

    python -m recipes.camvid                                # ESPNetv2-1.5, trained on Cityscapes
    python -m recipes.camvid --network espnet               # ESPNet, trained on CamVid
    python -m recipes.camvid --smoke --out DIR --threads 1  # a few pictures, one epoch

Branches learn from two drives, labels not needed; the third calibrates, and test is reported. Of the test pictures, 62
are of a drive that trained the branches, 171 are of one that nothing here has seen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ee_surgery as ee
from ee_surgery.task import SEGMENTATION
from recipes.data import StreetScenes, camvid, weights
from recipes.espnet import ESPNet, ESPNetv2, OnCamVid

HELD_OUT = "0006R0"
"""The drive that calibrates."""
SIZE = (360, 480)
EXITS = {
    "espnet": ["encoder.level2.1", "encoder.level3.1", "encoder.level3.4"],
    "espnetv2_150": ["net.base_net.level3.2", "net.base_net.level4.2", "net.base_net"],
}
SIBLINGS = {"espnet": (), "espnetv2_150": ("espnetv2_100", "espnetv2_050")}
DROPS = (0.0, 0.0025, 0.005, 0.01, 0.02)


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


def static(name: str, few: int | None) -> dict[str, Any]:
    """Measures of a network alone on test."""
    model, mean, std = network(name)
    tallies = []
    for image, label in Pictures(scenes("test", few), mean, std, labels=True):
        with torch.no_grad():
            tallies.append(SEGMENTATION.tally(model(image[None]), SEGMENTATION.check_target(label[None], 12, 1)))
    whole = torch.cat(tallies)
    return {name: of(whole) for name, of in SEGMENTATION.measures.items()}


def rows(calibrating: ee.ExitRecords, test: ee.ExitRecords) -> list[dict[str, Any]]:
    """Operating points chosen on one set of records, on the other."""
    frontier, found = ee.Frontier.search(calibrating), []
    for drop in DROPS:
        point = frontier.at(max_accuracy_drop=drop)
        replay = test.replay(point.policy)
        found.append(
            {
                "drop": drop,
                "outcome": replay.outcome.mean().item(),
                "agreement": test.agreement[replay.answer_index, torch.arange(len(test))].mean().item(),
                "cost": replay.macs.mean().item() / test.base_macs,
                "shares": torch.bincount(replay.exit_index, minlength=len(test.exits) + 1)
                .double()
                .div(len(test))
                .tolist(),
                "thresholds": point.thresholds,
                "score": str(point.score),
                **test.measures(replay.answer_index),
            }
        )
    return found


def main() -> None:
    """Train, record, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(EXITS), default="espnetv2_150")
    parser.add_argument("--labels", action="store_true", help="train and calibrate with labels")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few, epochs = (4, 1) if options.smoke else (None, options.epochs)
    model, mean, std = network(options.network)
    learning = [drive for drive in ("0016E5", "0001TP", "0006R0") if drive != HELD_OUT]
    train = Pictures(scenes("train", few, learning), mean, std, options.labels, training=True)
    held_out = Pictures(scenes("train", few, [HELD_OUT]), mean, std, options.labels)
    test = Pictures(scenes("test", few), mean, std, labels=True)
    sizes = {"stride": options.stride, "depth": options.depth, "width": options.width}
    branched = ee.augment(
        model, EXITS[options.network], branch=ee.BranchSpec("dense", options=sizes),
        sample=torch.zeros(2, 3, *SIZE), seed=options.seed,
    )  # fmt: skip
    print(branched.specs, [f"{m / branched.trunk_macs[-1]:.3f}" for m in branched.branch_macs])
    config = ee.TrainConfig(
        epochs=epochs, batch_size=4, lr=2e-3, weight_decay=1e-3, distill=0.0 if options.labels else 1.0, temperature=1.0, validation=0,
        teach="labels" if options.labels else "original", ema=0.98, mixed_precision="auto", seed=options.seed,
        checkpoint_dir=None if options.smoke else str(options.out / "training"),
    )  # fmt: skip
    started = time.perf_counter()
    ee.train(branched, train, config)
    minutes = (time.perf_counter() - started) / 60
    options.out.mkdir(parents=True, exist_ok=True)
    branched.save_pretrained(options.out / "adapter")
    calibrating, tested = (ee.record(branched, data, batch_size=4) for data in (held_out, test))
    calibrating.save(options.out / "calibrating.safetensors")
    tested.save(options.out / "test.safetensors")
    alone = [tested.measures(torch.full((len(tested),), k)) for k in range(len(tested.exits) + 1)]
    result = {
        "network": options.network, "labels": options.labels, "epochs": epochs, "seed": options.seed,
        "minutes": minutes, "exits": list(tested.exits), "original": tested.measures(), "alone": alone,
        "alone_agreement": tested.agreement.mean(1).tolist(),
        "rows": rows(calibrating, tested), "receipt": branched.receipt().unchanged, "torch": torch.__version__,
    }  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
