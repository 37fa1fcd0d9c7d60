"""The one table of models the tests run on: small, random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.models import build
from benchmarks.models import sample as shield_gemma_sample
from ee_surgery.backbone.base import Sample
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
    # timm 1.0.28 lacks these two
    *(_timm(name, 160) for name in ("test_maxvit", "test_vit_relpos") if timm.is_model(name)),
    _timm("test_nfnet", 64),
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
    _timm("vgg11", 64, mlp_ratio=0.05),  # else nine tenths of its weights are in two layers
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
LARGE = {
    "test_maxvit",
    "swin_tiny_patch4_window7_224",
    "crossvit_tiny_240",
    "coatnet_nano_rw_224",
    "mixer_s32_224",
    "hrnet_w18_small",
}
"""Entries whose capture takes seconds: for the slow tests."""
EVERY = [pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] * (entry.name in LARGE)) for entry in ZOO]
"""What tests over the whole zoo are parametrised with."""


@dataclass(frozen=True)
class Special:
    """A model whose inputs, outputs or layouts are not those of a picture classifier."""

    name: str
    make: Callable[[], nn.Module]
    given: Callable[[], Sample] | None = None
    """Its sample, where it does not say itself what it takes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `inspect`."""

    def __str__(self) -> str:
        return self.name

    @cached_property
    def graph(self) -> ee.ModelGraph:
        """Its graph, with fixed random weights; captured once a process, so leave the model as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ee.inspect(self.make().eval(), self.given() if self.given else None, **self.options)

    def augment(self, exits: int = 2, **more: Any) -> ee.EarlyExitModel:
        """With this many exits, and branches of its own."""
        return ee.attach(self.graph, ee.place(self.graph, exits), **more)


def _tiny_hf(cls: str, config: str | None = None, given: Callable[[], Sample] | None = None, **options: Any) -> Special:
    def make() -> nn.Module:
        name = config or cls.partition("For")[0] + "Config"
        return getattr(transformers, cls)(getattr(transformers, name)(num_labels=5, **options))

    return Special(f"hf-{cls}", make, given)


def _shield_gemma() -> nn.Module:
    return build("hf:ShieldGemma2ForImageClassification")


_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}

TEXTS = [
    _tiny_hf("BertForSequenceClassification", **_TEXT),
    _tiny_hf("RobertaForSequenceClassification", pad_token_id=1, max_position_embeddings=80, **_TEXT),
    _tiny_hf("ElectraForSequenceClassification", embedding_size=32, **_TEXT),
    _tiny_hf("AlbertForSequenceClassification", embedding_size=16, **_TEXT),
    _tiny_hf("DistilBertForSequenceClassification", vocab_size=99, dim=32, n_layers=4, n_heads=2, hidden_dim=64),
    _tiny_hf("ModernBertForSequenceClassification", pad_token_id=0, local_attention=8, **_TEXT),
    _tiny_hf(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        **_TEXT,
    ),
]
SPECIAL = [
    *TEXTS,
    _tiny_hf("ImageGPTForImageClassification", vocab_size=17, n_positions=16, n_embd=32, n_layer=4, n_head=2),
    _tiny_hf("Siglip2ForImageClassification", vision_config={**_VISION, "num_patches": 16, "patch_size": 4}),
    _tiny_hf("CLIPForImageClassification", vision_config={**_VISION, "image_size": 32, "patch_size": 8}),
    _tiny_hf("DeiTForImageClassificationWithTeacher", **_TINY, intermediate_size=64),
    _tiny_hf(
        "PerceiverForImageClassificationLearned",
        num_latents=8,
        d_latents=32,
        num_self_attends_per_block=4,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        image_size=16,
    ),
    _tiny_hf("TimmWrapperForImageClassification", architecture="test_resnet"),
    _tiny_hf("PPLCNetForImageClassification", scale=0.25, class_expand=32),
    Special("hf-ShieldGemma2", _shield_gemma, lambda: shield_gemma_sample("hf:ShieldGemma2ForImageClassification")),
    Special(
        "tnt",
        lambda: timm.create_model(
            "tnt_s_legacy_patch16_224",
            img_size=64,
            embed_dim=32,
            inner_dim=8,
            depth=4,
            num_heads_outer=2,
            num_heads_inner=2,
        ),
    ),
    Special("mobilevit", lambda: timm.create_model("mobilevit_xxs"), lambda: torch.randn(2, 3, 64, 64)),
    Special("coat", lambda: timm.create_model("coat_lite_tiny", img_size=64), lambda: torch.randn(2, 3, 64, 64)),
    Special(
        "headless-timm",
        lambda: timm.create_model("test_resnet", num_classes=0),
        lambda: torch.randn(2, 3, 64, 64),
        {"num_classes": 5},
    ),
    Special(
        "headless-hf",
        lambda: transformers.ViTModel(transformers.ViTConfig(**_TINY, intermediate_size=64)),  # pyright: ignore[reportArgumentType]
        None,
        {"num_classes": 5},
    ),
]


@cache
def small() -> ee.ModelGraph:
    """The graph of four convolutions on pictures of 8 x 8, for tests that attach often."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 6), (6, 6), (6, 8), (8, 8)):
        layers.append(nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU()))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return ee.inspect(model.eval(), torch.randn(2, 3, 8, 8))


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


def two_exits(branch: str = "pool", confidence: bool = False) -> ee.EarlyExitModel:
    """A ResNet-8 for 16 px with two exits."""
    torch.manual_seed(0)
    sample = torch.randn(4, 3, 16, 16)
    return ee.augment(CifarResNet(8).eval(), 2, branch=ee.BranchSpec(branch, confidence=confidence), sample=sample)


POLICIES = [
    ("conv2", "margin", "most_confident", False),
    ("ztw", "entropy", "last", False),
    ("pool", "patience", "last", False),
    ("pool", "learned", "most_confident", True),
]
"""Branch, score, fallback, confidence units: every kind of thing that is carried from exit to exit."""
