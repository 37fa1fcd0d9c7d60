"""The image sets and pretrained networks of the recipes, read from the folder `EE_SURGERY_DATA`."""

from __future__ import annotations

import csv
import io
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


def folder() -> Path:
    """Where the data is: `EE_SURGERY_DATA`, or `../shared/data` next to the repository."""
    return Path(os.environ.get("EE_SURGERY_DATA", Path(__file__).parents[2] / "shared" / "data"))


def cifar10(split: str, where: Path | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 `train` or `test`: uint8 images (N, 3, 32, 32), RGB, and int64 labels (N,)."""
    with np.load((where or folder() / "cifar10") / f"{split}.npz") as file:
        planes, labels = file["residual"], file["labels"].astype(np.int64)
    # (R - G, G, B - G) modulo 256, differenced along both axes: undo in the reverse order
    planes = np.cumsum(np.cumsum(planes, axis=3, dtype=np.uint8), axis=2, dtype=np.uint8)
    planes[0] += planes[1]
    planes[2] += planes[1]
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(1, 0, 2, 3))), torch.from_numpy(labels)


class Photos(NamedTuple):
    """Photographs of ten ImageNet classes."""

    images: list[Image.Image]
    """RGB, short side 160 px."""
    imagenet_index: Tensor
    """int64 (N,), in 0..999."""
    from_imagenet_val: Tensor
    """bool (N,): of the ImageNet validation set, on which no ImageNet network was trained."""


def imagenette(split: str, where: Path | None = None) -> Photos:
    """Imagenette `train` or `test`, decoded."""
    with np.load((where or folder() / "imagenette160") / f"{split}.npz") as file:
        data = {key: file[key] for key in ("jpeg", "offsets", "imagenet_index", "from_imagenet_val")}
    pictures = [data["jpeg"][a:b].tobytes() for a, b in itertools.pairwise(data["offsets"])]
    return Photos(
        [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures],
        torch.from_numpy(data["imagenet_index"].astype(np.int64)),
        torch.from_numpy(data["from_imagenet_val"]),
    )


def weights(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A pretrained network: float32 tensors by name, and mean and standard deviation of its inputs, each (3, 1, 1)."""
    path = folder() / "weights" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    mean, std = (torch.tensor([float(v) for v in header[key].split(",")]).view(3, 1, 1) for key in ("mean", "std"))
    return {key: tensor.float() for key, tensor in load_file(path).items()}, mean, std


def sst2(split: str) -> list[tuple[str, int]]:
    """Stanford Sentiment Treebank `train`, `dev` or `test`: sentences, and 0 negative or 1 positive."""
    lines = (folder() / "text" / f"sst2_{split}.tsv").read_text().splitlines()
    return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def ag_news() -> list[tuple[str, int]]:
    """The test set of AG News: title and description in one text; 0 World, 1 Sports, 2 Business, 3 Sci/Tech."""
    with (folder() / "text" / "ag_news_test.csv").open(newline="") as file:
        return [(f"{title}. {text}", int(label) - 1) for label, title, text in csv.reader(file)]


class StreetScenes(NamedTuple):
    """CamVid: pictures of drives, every pixel labelled."""

    images: Tensor
    """uint8 (N, 3, 360, 480), RGB."""
    labels: Tensor
    """uint8 (N, 360, 480): 0 to 10, or 255 where a pixel has no class."""
    drives: list[str]
    """The drive that each picture is of."""


def camvid(split: str, where: Path | None = None) -> StreetScenes:
    """CamVid `train`, `val` or `test`; val is a part of a drive that train shows too."""
    with np.load((where or folder() / "camvid") / f"{split}.npz") as file:
        data = {key: file[key] for key in file.files}

    def read(name: str, offsets: str) -> Tensor:
        cuts = itertools.pairwise(data[offsets])
        pictures = [np.asarray(Image.open(io.BytesIO(data[name][a:b].tobytes()))) for a, b in cuts]
        return torch.from_numpy(np.stack(pictures))

    labels = read("label_png", "label_offsets")
    drives = [name.decode().split("_")[0] for name in data["names"]]
    return StreetScenes(
        read("jpeg", "offsets").permute(0, 3, 1, 2).contiguous(),
        labels.masked_fill(labels == _CAMVID_VOID, 255),
        drives,
    )


_CAMVID_VOID = 11
