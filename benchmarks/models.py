"""The models of the coverage run: names, how to build them with random weights, and their inputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from ee_surgery.backbone.base import Sample

# The smallest member of every family of `timm.list_modules()` (by parameters, models for timm's own tests left out) is
# found by building all of them without memory, in minutes: `python -m benchmarks.coverage --smallest`.
SMALLEST: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}


def families() -> list[str]:
    """The smallest model of every timm family, as `timm:name`."""
    return [f"timm:{name}" for name in SMALLEST.values()]


def architectures() -> list[str]:
    """Every architecture of timm."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


# What to change in a default configuration: too heavy for two cores, or nothing to read it from without the network.
_SHRUNK: dict[str, dict[str, Any]] = {
    "EfficientNet": {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "TextNet": {"image_size": [224, 224]},
    "ImageGPT": {"n_positions": 64, "n_embd": 64, "n_layer": 6, "n_head": 4},
    "Perceiver": {
        "num_latents": 128,
        "d_latents": 512,
        "num_self_attends_per_block": 6,
        "num_cross_attention_heads": 1,
    },
    "IJepa": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384},
    "TimmWrapper": {"architecture": "resnet18"},
}


def transformers_classes() -> list[str]:
    """Every class of the image-classification auto mapping and the text classifiers, as `hf:Class`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGES

    names = [name for entry in IMAGES.values() for name in ([entry] if isinstance(entry, str) else entry)]
    texts = ["Bert", "DistilBert", "Roberta", "DebertaV2", "ModernBert", "Albert", "Electra"]
    return [f"hf:{name}" for name in names] + [f"hf:{name}ForSequenceClassification" for name in texts]


@cache
def build(name: str, device: str = "cpu") -> nn.Module:
    """A model with random weights from a fixed seed, in eval mode.

    Args:
        name: `timm:architecture` or `hf:Class`.
    """
    torch.manual_seed(0)
    source, _, model = name.partition(":")
    with torch.device(device):
        built = _timm(model) if source == "timm" else _transformers(model)
    for module in built.modules():  # statistics that are not the identity, as after training
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.8, 1.2)
    return built.eval()


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _transformers(name: str) -> nn.Module:
    import transformers

    family = name.partition("For")[0]
    changes = _SHRUNK.get(name, _SHRUNK.get(family, {}))
    cls = getattr(transformers, name)
    if family == "ShieldGemma2":
        return cls(_shield_gemma())
    return cls(cls.config_class(**changes))


def _shield_gemma() -> Any:
    import transformers

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024, "sliding_window": 64}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14}
    tokens: dict[str, Any] = {"image_token_index": 1000, "boi_token_index": 1001, "eoi_token_index": 1002}
    answers: dict[str, Any] = {"yes_token_index": 10, "no_token_index": 20}
    return transformers.ShieldGemma2Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens, **answers
    )


# Image sizes for models whose own are too large for two cores.
_SMALLER = {
    "timm:deepseek_vit_412m": 210,
    "timm:gemma4_vit_167m": 192,
    "timm:qwen3_vit_88m": 192,
    "timm:sam2_hiera_tiny": 224,
}


def sample(name: str) -> Sample | None:
    """An input that differs from what the model's own configuration describes."""
    generator = torch.Generator().manual_seed(0)
    if name in _SMALLER:
        return torch.randn(4, 3, _SMALLER[name], _SMALLER[name], generator=generator)
    if name != "hf:ShieldGemma2ForImageClassification":
        return None
    ids = torch.randint(30, 1000, (4, 12), generator=generator)
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 1001, 1000, 1002
    pixels = torch.randn(4, 3, 56, 56, generator=generator)
    kinds = (ids == 1000).long()
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}


def smallest() -> dict[str, str]:
    """What `SMALLEST` should hold: every model is built on the meta device and its parameters counted."""
    import timm

    found = {}
    for family in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=family):
            if not name.startswith("test_"):
                with torch.device("meta"):
                    sizes.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
        if sizes:
            found[family] = min(sizes)[1]
    return found
