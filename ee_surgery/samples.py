"""An example input for a model that says itself what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.inputs import Arguments

# Whatever their configuration says.
_BUILT_FOR_224 = ("PerceiverForImageClassificationFourier", "PerceiverForImageClassificationConvProcessing")
_FEW = 16  # channels of a picture; the first convolution of some models reads pictures folded into more
_TOKENS = 16  # of a text sample: any length does, others are captured when they come


def default_sample(model: nn.Module, library: str) -> Tensor | Arguments | None:
    """Four random inputs as the model's configuration describes them; None where it does not say.

    Any finite picture does, but the same one each time: `augment` verifies its cuts on it.
    """
    generator = torch.Generator().manual_seed(0)
    if library == "timm":
        shape = _timm_shape(model)
        return None if shape is None else torch.randn(4, *shape, generator=generator)
    if library == "transformers":
        return _transformers_sample(model, generator)
    return None


def _timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    # Of this very model, where it was built for one size; the configuration has the architecture's.
    sizes = (getattr(module, "img_size", None) for module in model.modules())
    grid: Any = next((found for found in sizes if _is_grid(found)), None)
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 0)
    known = size[0] if size else 3
    channels = first if 0 < first < _FEW and first % known else known  # other pictures than the architecture's
    if grid is None:
        return None if size is None else (channels, *size[1:])
    return (channels, *grid)


def _is_grid(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)


def _transformers_sample(model: nn.Module, generator: torch.Generator) -> Tensor | Arguments:
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    if getattr(model, "main_input_name", "") == "input_ids":
        return _token_ids(config, generator)
    if hasattr(vision, "num_patches") and config.model_type == "siglip2":  # patches of images of any shape
        side = int(vision.num_patches**0.5)
        pixels = torch.randn(4, vision.num_patches, vision.num_channels * vision.patch_size**2, generator=generator)
        mask = torch.ones(4, vision.num_patches, dtype=torch.long)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[side, side]] * 4),
        }
    inner = getattr(model, "timm_model", None)  # TimmWrapper
    shape = _timm_shape(inner) if isinstance(inner, nn.Module) else None
    if shape is None:
        size = getattr(vision, "image_size", None) or 224
        if type(model).__name__ in _BUILT_FOR_224:
            size = 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (int(getattr(vision, "num_channels", 3)), height, width)
    return torch.randn(4, *shape, generator=generator)


def _token_ids(config: Any, generator: torch.Generator) -> Arguments:
    """Texts of different lengths with their mask, or, for ImageGPT, whole pictures as cluster numbers."""
    if config.model_type == "imagegpt":
        return {"input_ids": torch.randint(0, config.vocab_size - 1, (4, config.n_positions), generator=generator)}
    pad = config.pad_token_id or 0
    lowest = pad + 1 if pad < config.vocab_size // 2 else 0
    ids = torch.randint(lowest, config.vocab_size, (4, _TOKENS), generator=generator)
    lengths = torch.tensor([_TOKENS, _TOKENS - 3, _TOKENS - 5, _TOKENS - 2])
    mask = (torch.arange(_TOKENS) < lengths[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
