"""The digit recogniser of the docs' live page: a small ResNet on scikit-learn's digits, with early exits, as ONNX.

    python -m recipes.digits        # writes docs/live/model.onnx and docs/live/pictures.json; minutes on one thread

ResNet-14 with 8, 16 and 32 channels, seed 0: trained on 900 digits, calibrated on 400; the pictures are the first of
the 497 that neither saw. Data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import ee_surgery as ee
from ee_surgery.demo import digits, pretrain
from recipes.networks import CifarResNet

PICTURES = 40  # on the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/live"), help="folder of the two files")
    parser.add_argument(
        "--epochs", type=int, default=60, help="passes over the digits, for the original and for branches"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CifarResNet(14, width=8, in_channels=1)
    enlarged, labels = digits(32)
    pretrain(model, enlarged[:900], labels[:900], options.epochs)
    model = nn.Sequential(nn.Upsample(scale_factor=4, mode="bilinear"), model).eval()
    images, _ = digits(8)
    learn, held_out, test = (
        TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 900), (900, 1300), (1300, len(images)))
    )
    branched = ee.augment(model, exits=2, branch="conv2", sample=images[:4])
    config = ee.TrainConfig(epochs=options.epochs, batch_size=64, lr=1e-2, validation=0, progress=False)
    print(ee.train(branched, learn, config))
    print(ee.calibrate(branched, held_out))
    print(branched.operate(max_accuracy_drop=0.005))
    print(ee.evaluate(branched, test))
    path = branched.export(options.out / "model.onnx")
    ink = (8 * test.tensors[0][:PICTURES].flatten(1) + 8).int()  # (PICTURES, 64) in 0..16, as they were
    pictures = {"labels": test.tensors[1][:PICTURES].tolist(), "ink": ink.tolist()}
    (options.out / "pictures.json").write_text(json.dumps(pictures))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB; compared: {ee.check_export(path, branched, test)}")


if __name__ == "__main__":
    main()
