"""Create the base of an adapter by its name: the only thing that an untrusted configuration decides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ee_surgery.backbone.base import Identity, make_model
from ee_surgery.errors import AdapterError
from ee_surgery.share.adapter import AdapterConfig, stored_base

_ADVICE = "Create it yourself and pass it: from_pretrained(folder, model=...)."
_TIMM_NAME = re.compile(r"\w+(\.[\w-]+)*")


def make_base(config: AdapterConfig, folder: Path, **hub: Any) -> nn.Module:
    """Create the base of an adapter with timm or transformers, with pretrained weights unless they are stored.

    No path, no scheme such as `hf-hub:` and no keyword argument is taken from the adapter.

    Args:
        folder: of the adapter, for a base that is stored there.
        hub: `token`, `cache_dir`, `local_files_only`, for transformers.
    Raises:
        AdapterError: it has no name to load it by, or its library cannot create it.
    """
    base = config.base
    _check_name(base)
    try:
        if base.library == "transformers":
            return _transformers(base, **hub)
        return _timm(base, config, folder)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(
            f"{base.library} could not create the base {base.model_id}: {str(error)[:500]} {_ADVICE}"
        ) from error


def base_with_weights(config: AdapterConfig, checkpoint: str) -> nn.Module:
    """The timm base of an adapter with weights from a file of the user's, or random ones without any.

    Architecture, classes and channels are the adapter's.

    Raises:
        AdapterError: it is no timm model, or timm cannot create it or load the file.
    """
    base, shape = config.base, next(iter(config.inputs.values())).shape
    _check_name(base)
    if base.library != "timm":
        raise AdapterError(f"A weights file is for timm models, and the base is {base.model_id}: give its folder.")
    sizes = {"num_classes": base.num_classes, "channels": shape[1] if len(shape) == 4 else None}
    try:
        return make_model("timm", base.model_id, checkpoint=checkpoint, pretrained=False, **sizes)
    except Exception as error:
        raise AdapterError(
            f"timm could not create {base.model_id} with {base.num_classes} classes and the weights of "
            f"{checkpoint or 'nothing'}: {' '.join(str(error).split())[:500]}"
        ) from error


def _check_name(base: Identity) -> None:
    if base.adapters:
        raise AdapterError(
            f"The base {base.model_id} has PEFT adapters, {base.adapters}, which are not part of this one. Load them "
            "with peft and pass the result: from_pretrained(folder, model=PeftModel.from_pretrained(base, ...))."
        )
    if base.library == "torch":
        raise AdapterError(f"The base {base.model_id} is a plain torch module. {_ADVICE}")
    if base.library == "transformers" and base.model_id == base.architecture:
        raise AdapterError(f"The base {base.model_id} was built from a configuration, not loaded by name. {_ADVICE}")
    repositories = [base.hub_id] if base.library == "timm" else [base.model_id, base.hub_id]
    try:
        if base.library == "timm" and not _TIMM_NAME.fullmatch(base.model_id):
            raise HFValidationError(f"{base.model_id!r} is not the name of a timm model.")
        for name in filter(None, repositories):
            validate_repo_id(name)
    except HFValidationError as error:
        raise AdapterError(
            f"The base {base.model_id!r} is not a name on the Hub or in timm, and an adapter may not name files to "
            f"read: {error} {_ADVICE}"
        ) from error


def _timm(base: Identity, config: AdapterConfig, folder: Path) -> nn.Module:
    import timm

    if config.own_base:
        # Checked on the meta device first: the name and the number of classes come from the adapter.
        with torch.device("meta"):
            model = make_model("timm", base.model_id, num_classes=base.num_classes, pretrained=False)
        stored_base(folder, config.files).check_base(model)
        return make_model("timm", base.model_id, num_classes=base.num_classes, pretrained=False)
    published = timm.get_pretrained_cfg(base.model_id) if base.model_id in timm.list_pretrained() else None
    if published is not None and base.num_classes not in (0, published.num_classes):
        raise AdapterError(
            f"The base {base.model_id} has its own head for {base.num_classes} classes; the published one has "
            f"{published.num_classes}. {_ADVICE}"
        )
    classes = 0 if base.num_classes == 0 else None
    return make_model("timm", base.model_id, num_classes=classes, hub_id=base.hub_id)


def _transformers(base: Identity, **hub: Any) -> nn.Module:
    from transformers import AutoConfig

    options = {"revision": base.revision, **hub}
    settings = AutoConfig.from_pretrained(base.model_id, trust_remote_code=False, **options)
    if getattr(settings, "quantization_config", None) is not None or "/" in str(settings._attn_implementation):
        raise AdapterError(f"The base {base.model_id} requires quantization or code from the Hub. {_ADVICE}")
    return make_model("transformers", base.model_id, architecture=base.architecture, **options)
