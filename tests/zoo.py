"""The one table of models the tests run on: small, random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import timm
import torch
import transformers
from torch import Tensor, nn

import ee_surgery as ee
from recipes.networks import CifarResNet


@dataclass(frozen=True)
class Entry:
    """A model of the zoo."""

    name: str
    make: Callable[[], nn.Module]
    size: int
    """Side of the input image."""

    def __str__(self) -> str:
        return self.name

    def sample(self, batch: int = 3, seed: int = 1) -> Tensor:
        """A random batch (B, 3, size, size)."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


def _timm(name: str, size: int, **options: object) -> Entry:
    return Entry(name, lambda: timm.create_model(name, num_classes=10, **options), size)  # pyright: ignore[reportArgumentType]


def _hf(family: str, size: int = 32, **options: object) -> Entry:
    def make() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(num_labels=10, **options)
        return getattr(transformers, f"{family}ForImageClassification")(config)

    return Entry(f"hf-{family}", make, size)


_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_PYRAMID = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "image_size": 64, "window_size": 2}

ZOO = [
    _timm("test_resnet", 64),
    _timm("test_vit", 160),
    _timm("test_convnext", 64),
    _timm("test_efficientnet", 64),
    _timm("test_byobnet", 64),
    _timm("test_maxvit", 160),
    _timm("test_nfnet", 64),
    _timm("test_vit_relpos", 160),
    _timm(
        "swin_tiny_patch4_window7_224",
        64,
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
    ),
    _timm("densenet121", 64, growth_rate=8, block_config=(2, 2, 2, 2)),
    _timm("hrnet_w18_small", 64),
    _timm("crossvit_tiny_240", 240, depth=((1, 1, 0), (1, 1, 0)), embed_dim=(32, 64), num_heads=(2, 2)),
    _timm("mobilenetv3_small_050", 64),
    _timm("mobilenetv4_conv_small", 64),
    _timm("coatnet_nano_rw_224", 224, depths=(1, 1, 2, 1), embed_dim=(16, 32, 64, 128), stem_width=(8, 16)),
    _timm("mixer_s32_224", 224),
    _timm("vgg11", 64),
    _hf("ViT", intermediate_size=64, **_TINY),
    _hf("Dinov2", **_TINY),
    _hf("DeiT", intermediate_size=64, **_TINY),
    _hf("Beit", intermediate_size=64, use_relative_position_bias=True, **_TINY),
    _hf("Swin", 64, **_PYRAMID),
    _hf("ResNet", 64, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], embedding_size=16, layer_type="basic"),
    _hf("ConvNext", 64, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]),
    _hf("MobileNetV2", 64),
    Entry("cifar-resnet20", lambda: CifarResNet(20), 32),
    Entry("cifar-resnet56", lambda: CifarResNet(56), 32),
]
BY_NAME = {entry.name: entry for entry in ZOO}


@cache
def original(name: str) -> nn.Module:
    """The model of an entry with fixed random weights and BatchNorm statistics that are not the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BY_NAME[name].make().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


@cache
def graph(name: str) -> ee.ModelGraph:
    """Its graph."""
    return ee.inspect(original(name), BY_NAME[name].sample())


@cache
def branched(name: str) -> ee.EarlyExitModel:
    """The model with three exits (two where there are fewer blocks); shared: leave it as it was."""
    found = graph(name)
    candidates = {point.macs for point in found.blocks if 0 < point.macs < found.macs}
    model = ee.attach(found, ee.place(found, min(3, len(candidates)), "linear" if len(candidates) > 4 else "fine"))
    for parameter in model.branches.parameters():  # logits of different samples should differ
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    return model
