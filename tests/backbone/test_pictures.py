"""Pictures are prepared as the base's own library does, and default samples are pictures of that size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

import ee_surgery as ee
from ee_surgery.backbone.base import Backbone
from ee_surgery.share.processor import picture_transform

_HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_UNEVEN = {"input_size": [3, 96, 128], "mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.4]}
STATED: dict[str, dict[str, Any]] = {
    "size": {"input_size": [3, 64, 64], **_HALF, "crop_pct": 0.9, "interpolation": "bilinear"},
    "uneven, squashed": {**_UNEVEN, "crop_pct": 1.0, "interpolation": "nearest", "crop_mode": "squash"},
    "one mean, border": {"input_size": [3, 64, 64], "mean": [0.4], "std": [0.2], "crop_mode": "border"},
    "no size": _HALF,
    "img_size": {"img_size": 72, "test_input_size": [3, 96, 96]},
}


def pictures() -> list[Image.Image]:
    """Photographs are smooth: noise at a few pixels, scaled up."""
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)) for _ in range(2)]
    sizes = (130, 90), (70, 200)
    return [noise.resize(size, Image.Resampling.BICUBIC) for noise, size in zip(small, sizes, strict=True)]


def wrapper(stated: dict[str, Any] | None, name: str = "test_resnet", **built: Any) -> nn.Module:
    more = {} if stated is None else {"pretrained_cfg": stated}
    config = TimmWrapperConfig(architecture=name, num_labels=5, model_args=built or None, **more)
    return TimmWrapperForImageClassification(config).eval()


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    return tuple(next(iter(Backbone(model).sample.values())).shape[1:])


def check(model: nn.Module, expected: list[Tensor], given: list[Image.Image]) -> None:
    transform = picture_transform(Backbone(model))
    for picture, wanted in zip(given, expected, strict=True):
        assert torch.equal(transform(picture), wanted)
    assert sample_shape(model) == tuple(expected[0].shape)


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED.keys())
def test_a_wrapped_timm_model_gets_the_pictures_of_transformers_own_processor(stated: dict[str, Any]) -> None:
    processor = TimmWrapperImageProcessor(stated)
    check(wrapper(stated), [processor(p)["pixel_values"][0] for p in pictures()], pictures())


@pytest.mark.parametrize("built", [{"img_size": 96}, {"img_size": 64, "dynamic_img_size": True}], ids=str)
def test_a_wrapped_vit_keeps_the_size_that_its_configuration_states(built: dict[str, Any]) -> None:
    stated = {"input_size": [3, 96, 96], **_HALF}
    processor = TimmWrapperImageProcessor(stated)
    model = wrapper(stated, "vit_tiny_patch16_224", depth=2, **built)
    check(model, [processor(p)["pixel_values"][0] for p in pictures()], pictures())


def test_a_size_that_the_model_refuses_gives_way_to_the_one_it_was_built_for() -> None:
    model = wrapper({"input_size": [3, 96, 96], **_HALF}, "vit_tiny_patch16_224", depth=2, img_size=64)
    assert sample_shape(model) == (3, 64, 64)
    assert picture_transform(Backbone(model))(pictures()[0]).shape == (3, 64, 64)


def test_pictures_of_one_channel() -> None:
    stated = {"input_size": [1, 40, 40], "mean": [0.5], "std": [0.25]}
    processor, grey = TimmWrapperImageProcessor(stated), [picture.convert("L") for picture in pictures()]
    check(wrapper(stated, in_chans=1), [processor(picture)["pixel_values"][0] for picture in grey], grey)
    plain = timm.create_model("test_resnet", num_classes=5, in_chans=1, pretrained_cfg_overlay=stated).eval()
    wanted = create_transform(**resolve_data_config({}, model=plain))
    check(plain, [wanted(picture) for picture in grey], grey)
    assert picture_transform(Backbone(plain))(pictures()[0]).shape == (1, 40, 40)  # colours are converted


def test_other_channels_than_the_known_means_are_of_are_refused() -> None:
    for model in (timm.create_model("test_resnet", in_chans=1), wrapper({"input_size": [3, 64, 64]}, in_chans=1)):
        assert sample_shape(model)[0] == 1
        with pytest.raises(ee.DataError, match="has no preprocessing settings"):
            picture_transform(Backbone(model))


_OVERLAY = {**_UNEVEN, "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_resnet", {"pretrained_cfg_overlay": _OVERLAY}, None),
        ("test_vit", {"pretrained_cfg_overlay": {"input_size": (3, 96, 96), "mean": (0.5, 0.5, 0.5)}}, None),
        ("test_vit", {"img_size": 96}, 96),
        ("test_vit", {"img_size": 64, "dynamic_img_size": True}, 64),
    ],
    ids=str,
)
def test_a_timm_model_gets_the_pictures_that_it_was_created_for(name: str, options: Any, size: int | None) -> None:
    model = timm.create_model(name, num_classes=5, **options).eval()
    wanted = create_transform(**resolve_data_config({"img_size": size}, model=model))
    check(model, [wanted(picture) for picture in pictures()], pictures())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_pictures_of_any_mode_are_converted(mode: str) -> None:
    transform = picture_transform(Backbone(wrapper(STATED["size"])))
    picture = pictures()[0].convert(mode)
    assert torch.equal(transform(picture), transform(picture.convert("RGB")))


def test_the_adapter_carries_the_settings_of_a_wrapped_model(tmp_path: Path) -> None:
    model, processor = wrapper(STATED["size"]), TimmWrapperImageProcessor(STATED["size"])
    folder = ee.augment(model, 2).save_pretrained(tmp_path / "adapter")
    for picture in pictures():
        wanted = processor(picture)["pixel_values"][0]
        assert torch.equal(AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"][0], wanted)
        assert torch.equal(ee.from_pretrained(folder, model).transform()(picture), wanted)


def test_settings_of_timm_s_processor_given_at_saving_are_kept(tmp_path: Path) -> None:
    model, processor = wrapper(STATED["size"]), TimmWrapperImageProcessor(STATED["uneven, squashed"])
    folder = ee.augment(model, 2).save_pretrained(tmp_path / "adapter", processor=processor)
    picture = pictures()[0]
    wanted = processor(picture)["pixel_values"][0]
    assert torch.equal(ee.from_pretrained(folder, model).transform()(picture), wanted)
    assert torch.equal(AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"][0], wanted)


def _convnext(folder: Path, **processor: Any) -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=5)
    transformers.ConvNextForImageClassification(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(**processor).save_pretrained(folder)
    return transformers.ConvNextForImageClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 96}, "crop_pct": 0.9, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
        {"size": {"shortest_edge": 384}, "resample": 2},
    ],
    ids=str,
)
def test_models_of_transformers_get_the_pictures_and_the_sample_of_their_processor(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = _convnext(tmp_path, **settings)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    check(model, [processor(p, return_tensors="pt")["pixel_values"][0] for p in pictures()], pictures())


def test_a_processor_s_size_that_the_model_refuses_is_not_its_sample(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=16)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert sample_shape(model) == (3, 32, 32)
