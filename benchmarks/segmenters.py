"""Small segmentation models with random weights: every class of transformers that can be built, torchvision, smp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Segmenter:
    """A model and the pictures it takes."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 96)
    package: str = ""
    """What has to be installed beyond what the library needs."""

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """With weights from one seed, in eval mode; norms have seen something, so that answers are not all alike."""
        torch.manual_seed(0)
        model = self.make().eval()
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 10)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
        return model

    def pictures(self, count: int = 5) -> Tensor:
        """(count, 3, H, W)."""
        return torch.randn(count, 3, *self.size, generator=torch.Generator().manual_seed(1))


def _hf(cls: str, config: str, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{config}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{cls}ForSemanticSegmentation")(made)


_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


def _beit(cls: str) -> nn.Module:
    return _hf(
        cls, cls, **_VIT, image_size=64, out_indices=[1, 2, 3, 4], pool_scales=(1, 2), auxiliary_channels=16,
        use_relative_position_bias=True,
    )  # fmt: skip


def _dpt() -> nn.Module:
    sizes = {"fusion_hidden_size": 16, "neck_hidden_sizes": [8, 16, 24, 32], "reassemble_factors": [4, 2, 1, 0.5]}
    return _hf("DPT", "DPT", **_VIT, **sizes, image_size=64, backbone_out_indices=[0, 1, 2, 3])


def _mobilevit(cls: str) -> nn.Module:
    if cls == "MobileViT":
        return _hf(cls, cls, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                   aspp_out_channels=16, num_attention_heads=2)  # fmt: skip
    return _hf(cls, cls, width_multiplier=0.25, aspp_out_channels=16)


def _segformer() -> nn.Module:
    return _hf("Segformer", "Segformer", depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16,
               num_attention_heads=[1, 2, 2, 4])  # fmt: skip


def _upernet() -> nn.Module:
    from transformers import ConvNextConfig

    backbone = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    return _hf("UperNet", "UperNet", backbone_config=backbone, hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=24)


def _sapiens() -> nn.Module:
    from transformers.models.sapiens2.configuration_sapiens2 import Sapiens2HeadConfig

    head = Sapiens2HeadConfig(
        num_labels=CLASSES, upsample_out_channels=[16], upsample_kernel_sizes=[4], conv_out_channels=[16],
        conv_kernel_sizes=[1],
    )  # fmt: skip
    return _hf("Sapiens2", "Sapiens2", **{**_VIT, "patch_size": 16}, head_config=head, num_key_value_attention_heads=2,
               num_first_full_attention_layers=1, num_last_full_attention_layers=1)  # fmt: skip


def _tips() -> nn.Module:
    from transformers import AutoConfig

    backbone = AutoConfig.for_model(
        "tipsv2_vision_model", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56,
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    return _hf("Tipsv2Dpt", "Tipsv2Dpt", backbone_config=backbone, fusion_hidden_size=16,
               neck_hidden_sizes=[8, 16, 24, 32])  # fmt: skip


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss="resnet" in name)


def _smp(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES)


SEGMENTERS = [
    Segmenter("hf-Beit", partial(_beit, "Beit"), (64, 64)),
    Segmenter("hf-Data2VecVision", partial(_beit, "Data2VecVision"), (64, 64)),
    Segmenter("hf-DPT", _dpt, (64, 64)),
    Segmenter("hf-MobileNetV2", partial(_hf, "MobileNetV2", "MobileNetV2", depth_multiplier=0.25)),
    Segmenter("hf-MobileViT", partial(_mobilevit, "MobileViT")),
    Segmenter("hf-MobileViTV2", partial(_mobilevit, "MobileViTV2")),
    Segmenter("hf-Sapiens2", _sapiens),
    Segmenter("hf-Segformer", _segformer),
    Segmenter("hf-Tipsv2Dpt", _tips, (56, 84)),
    Segmenter("hf-UperNet", _upernet),
    Segmenter("torchvision-fcn_resnet50", partial(_torchvision, "fcn_resnet50")),
    Segmenter("torchvision-deeplabv3_resnet50", partial(_torchvision, "deeplabv3_resnet50")),
    Segmenter("torchvision-deeplabv3_mobilenet_v3_large", partial(_torchvision, "deeplabv3_mobilenet_v3_large")),
    Segmenter("torchvision-lraspp_mobilenet_v3_large", partial(_torchvision, "lraspp_mobilenet_v3_large")),
    Segmenter("smp-Unet", partial(_smp, "Unet", "resnet18"), package="segmentation_models_pytorch"),
    Segmenter("smp-FPN", partial(_smp, "FPN", "tu-test_resnet"), package="segmentation_models_pytorch"),
    Segmenter("smp-DeepLabV3Plus", partial(_smp, "DeepLabV3Plus", "timm-mobilenetv3_small_100"), package="segmentation_models_pytorch"),
    Segmenter("smp-Segformer", partial(_smp, "Segformer", "mit_b0"), package="segmentation_models_pytorch"),
]
