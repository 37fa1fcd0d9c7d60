"""The pictures of docs/segmentation.md, docs/multi-label.md, docs/embeddings.md and docs/regression.md.

    python -m benchmarks.answer_figures segmentation runs/camvid/espnet
    python -m benchmarks.answer_figures embeddings runs/embeddings/resnet56-gallery-0
    python -m benchmarks.answer_figures multi_label runs/multi_label_pairs
    python -m benchmarks.answer_figures regression            # trains first

Folders are those that the recipes wrote. Maps alone are shown of CamVid, whose licence excludes commercial use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from recipes import camvid, data
from recipes.cifar10_resnet56 import network, pictures
from recipes.multi_label_pairs import pairs

ASSETS = Path("docs/assets")
COLOURS = (
    "#8fc8ff", "#7a7a7a", "#d8c67a", "#463a66", "#c9a0dc", "#3f8f3f", "#e8b23a", "#8a5a2b", "#2f5fd0", "#d03030",
    "#20c0c0", "#ffffff",
)  # fmt: skip
"""Sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist; no class."""
SHOWN = 3


def segmentation(folder: Path) -> None:
    """Labels, and the maps of every exit and of the original: the surest, the middle and the least sure picture."""
    model, mean, std = camvid.network(folder.name)
    branched = ee.from_pretrained(folder / "adapter", model, sample=torch.zeros(2, 3, *camvid.SIZE))
    scenes = camvid.scenes("test", None)
    records = ee.ExitRecords.load(folder / "test.safetensors")
    order = records.scores("max_prob")[0].argsort(descending=True)
    figure, axes = plt.subplots(SHOWN, 2 + len(branched.exits), figsize=(13, 6.2), squeeze=False)
    for row, i in zip(axes, order[:: (len(order) - 1) // (SHOWN - 1)].tolist(), strict=False):
        image = ((scenes.images[i].float() / 255 - mean) / std)[None]
        label = scenes.labels[i].long()
        with torch.no_grad():
            found = branched.all_exits(image)
        _map(row[0], label.masked_fill(label == 255, len(COLOURS) - 1), "labels")
        for axis, name, logits in zip(row[1:], [*branched.exits, "original"], found, strict=True):
            outcome = branched.task.outcome(logits, branched.task.check_target(label[None], 12, 1)).item()
            _map(axis, logits[0].argmax(0), f"{name}: {outcome:.1%}")
    _save(figure, "segmentation")


def _map(axis: Any, classes: Tensor, title: str) -> None:
    axis.imshow(classes, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def embeddings(folder: Path) -> None:
    """Queries that leave at each exit, with their nearest neighbours in the gallery."""
    (gallery, _), mean, std = pictures("train", 2000)
    (queries, _), _, _ = pictures("test", None)
    model = network(56)
    model.linear = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    branched = ee.from_pretrained(folder / "adapter", model)
    frontier = branched.frontier
    assert frontier is not None
    branched.operate(frontier.at(max_accuracy_drop=0.01))
    output = branched.predict((queries[4000:4400].float() / 255 - mean) / std)
    task: Any = branched.task
    similar = F.normalize(output.logits, dim=1) @ F.normalize(task.embeddings, dim=1).T
    names, near = [*branched.exits, "original"], 5
    figure, axes = plt.subplots(SHOWN * len(names), 1 + near, figsize=(7, 1.15 * SHOWN * len(names)))
    for row, (k, i) in zip(axes, _some(output.exit_index, len(names)), strict=False):
        shown = [queries[4000 + i], *gallery[similar[i].topk(near).indices]]
        for axis, picture in zip(row, shown, strict=True):
            axis.imshow(picture.permute(1, 2, 0))
            axis.axis("off")
        row[0].set_title(f"left at {names[k]}", fontsize=7)
    axes[0][1].set_title("nearest", fontsize=7)
    _save(figure, "embeddings")


def multi_label(folder: Path) -> None:
    """Pairs that leave at each exit, with the labels found."""
    (others, truth), mean, std = pictures("test", None)
    images, labels = (part[2500:2900] for part in pairs(others, truth, 5_000, 0))
    model = network(20)
    from safetensors.torch import load_model

    load_model(model, str(folder / "base-0.safetensors"))
    branched = ee.from_pretrained(folder / "adapter", model.eval())
    frontier = branched.frontier
    assert frontier is not None
    branched.operate(frontier.at(max_accuracy_drop=0.005))
    output = branched.predict((images.float() / 255 - mean) / std)
    names, classes = [*branched.exits, "original"], _classes()
    figure, axes = plt.subplots(len(names), SHOWN, figsize=(8, 1.9 * len(names)), squeeze=False)
    for axis, (k, i) in zip(axes.flat, _some(output.exit_index, len(names)), strict=False):
        said, right = output.logits[i] > 0, labels[i] > 0
        found = ", ".join(classes[c] for c in said.nonzero().flatten().tolist()) or "none"
        axis.imshow(images[i].permute(1, 2, 0))
        axis.set_title(f"{names[k]}: {found}{'' if bool((said == right).all()) else ' (wrong)'}", fontsize=8)
        axis.axis("off")
    _save(figure, "multi-label")


def _classes() -> list[str]:
    import numpy as np

    with np.load(data.folder() / "cifar10" / "test.npz") as file:
        return [str(name) for name in file["classes"]]


def regression(folder: Path | None = None) -> None:
    """Maps of a DepthAnything of random weights on street scenes: of a branch that learned from it, and its own."""
    torch.manual_seed(0)
    size = (112, 154)
    backbone = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=2, image_size=112, patch_size=14,
        out_indices=[2, 4, 5, 6],  # pyright: ignore[reportCallIssue]
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=64, patch_size=14, neck_hidden_sizes=[16, 32, 64, 64],
        fusion_hidden_size=32, head_hidden_size=16,
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    scenes = F.interpolate(camvid.scenes("train", 120).images.float() / 255, size, mode="area") * 4 - 2
    with torch.no_grad():
        spread = model(scenes[:8]).predicted_depth.std().item()
    branched = ee.augment(
        model, ["backbone.encoder.layer.1"], sample=scenes[:2], task=ee.Regression(tolerance=spread / 2)
    )
    ee.train(branched, list(scenes[:112].split(8)), ee.TrainConfig(epochs=12, teach="original", lr=2e-3))
    with torch.no_grad():
        early, own = branched.all_exits(scenes[112:115])
    figure, axes = plt.subplots(SHOWN, 3, figsize=(9, 6.2))
    for row, a, b in zip(axes, early, own, strict=True):
        near = (a - b).abs() <= spread / 2
        named = (("exit", a), ("original", b), (f"within the tolerance: {near.double().mean():.0%}", near))
        for axis, (title, shown) in zip(row, named, strict=True):
            limits = {} if shown.dtype == torch.bool else {"vmin": b.min().item(), "vmax": b.max().item()}
            axis.imshow(shown.double(), **limits)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    _save(figure, "regression")


def _some(exit_index: Tensor, exits: int) -> list[tuple[int, int]]:
    """Exit and number of the first samples that left at each."""
    return [(k, i) for k in range(exits) for i in (exit_index == k).nonzero().flatten()[:SHOWN].tolist()]


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ASSETS / f"{name}.png", dpi=110)
    print(f"wrote {ASSETS / name}.png")


FIGURES: dict[str, Callable[..., None]] = {
    "segmentation": segmentation, "embeddings": embeddings, "multi_label": multi_label, "regression": regression,
}  # fmt: skip


def main() -> None:
    """Draw one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args()
    FIGURES[options.figure](options.folder)


if __name__ == "__main__":
    main()
