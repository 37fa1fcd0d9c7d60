"""A sample input for a model that describes its own inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.backbone.inputs import Arguments
from ee_surgery.backbone.pictures import Takes, processor_shape, timm_shape

# Regardless of their configuration.
_BUILT_FOR_224 = ("PerceiverForImageClassificationFourier", "PerceiverForImageClassificationConvProcessing")
_TOKENS = 16  # length of a text sample; other lengths are captured when they occur


def default_sample(
    model: nn.Module, library: str, takes: Takes, named: tuple[str, str | None] | None = None
) -> Tensor | Arguments | None:
    """Four random inputs as the model describes them; images have the size of its own preprocessing.

    They are the same each time, since `augment` verifies its cuts on them.

    Args:
        takes: whether the model runs on images of a shape.
        named: repository or folder of a transformers model, and its revision, to look for an image processor.
    Returns:
        None if the model does not describe its inputs.
    """
    generator = torch.Generator().manual_seed(0)
    if library == "timm":
        shape = timm_shape(model, library, takes)
        return None if shape is None else torch.randn(4, *shape, generator=generator)
    if library == "transformers":
        return _transformers_sample(model, generator, takes, named)
    return None


def _transformers_sample(
    model: nn.Module, generator: torch.Generator, takes: Takes, named: tuple[str, str | None] | None
) -> Tensor | Arguments:
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
    shape = timm_shape(model, "transformers", takes)
    if shape is None:
        size = getattr(vision, "image_size", None) or 224
        if type(model).__name__ in _BUILT_FOR_224:
            size = 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (int(getattr(vision, "num_channels", 3)), height, width)
        # Some configurations have the pretraining size, or none.
        made = processor_shape(model, *named) if named else None
        if made is not None and made != shape and takes(made):
            shape = made
    return torch.randn(4, *shape, generator=generator)


def _token_ids(config: Any, generator: torch.Generator) -> Arguments:
    """Texts of different lengths with their mask or, for ImageGPT, whole images as cluster ids."""
    if config.model_type == "imagegpt":
        return {"input_ids": torch.randint(0, config.vocab_size - 1, (4, config.n_positions), generator=generator)}
    pad = config.pad_token_id or 0
    lowest = pad + 1 if pad < config.vocab_size // 2 else 0
    ids = torch.randint(lowest, config.vocab_size, (4, _TOKENS), generator=generator)
    lengths = torch.tensor([_TOKENS, _TOKENS - 3, _TOKENS - 5, _TOKENS - 2])
    mask = (torch.arange(_TOKENS) < lengths[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
