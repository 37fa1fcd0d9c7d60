"""Save a model with branches into an adapter folder, and read it back: the two halves side by side.

What is read becomes an `EarlyExitModel` in `pipeline.from_pretrained`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Backbone, Sample, digest_of
from ee_surgery.backbone.wrappers import unwrapped
from ee_surgery.branches.base import BRANCHES, BranchSpec
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import path, word
from ee_surgery.errors import AdapterError, ConfigError, FingerprintError, SurgeryWarning
from ee_surgery.receipt import Receipt
from ee_surgery.runtime.engine import Engine
from ee_surgery.share.adapter import AdapterConfig, change_adapter, load_adapter, load_base, save_adapter
from ee_surgery.share.base import make_base
from ee_surgery.share.card import CardInfo, save_card
from ee_surgery.share.hub import fetch, push_folder
from ee_surgery.share.probe import Probe, make_inputs
from ee_surgery.share.processor import (
    find_processor,
    load_preprocessing,
    load_processor,
    picture_transform,
    save_processor,
)
from ee_surgery.share.provenance import ATTACHED, as_stated
from ee_surgery.share.state import AdapterState, Carried
from ee_surgery.share.weights import Weights
from ee_surgery.task import Task, as_task, stored_task


class SharedModel(nn.Module):
    """The half of `EarlyExitModel` that is shared: the state that travels with it, saving and uploading."""

    engine: Engine
    specs: tuple[BranchSpec, ...]
    branches: BranchBank
    state: AdapterState
    """What travels with the branches."""
    _before: dict[str, str]
    """SHA-256 of the original's tensors when it got its branches."""

    own_base = Carried[bool]()
    """Whether the original is a copy that was trained, and so is saved along."""
    provenance = Carried[dict[str, Any]]()
    """Where the branches come from, as plain data, saved along: `training`, `evaluation`, `other_base`, `card`."""
    preprocessing = Carried[dict[str, Any] | None]()
    """What `timm.data.create_transform` takes to prepare pictures, where timm knows the original; saved along."""
    processor = Carried[Any]()
    """The image processor or tokenizer of transformers that was saved along, or will be."""
    frontier = Carried[Frontier | None]()
    """What `calibrate` found."""

    @property
    def untrained(self) -> list[str]:
        """Exits whose branches still are, bit for bit, as they were attached; hashes them."""
        began = self.state.provenance.get(ATTACHED)
        if not isinstance(began, Mapping):
            return []
        each = zip(self.engine.plan.names, self.branches, strict=True)
        return [name for name, branch in each if began.get(name) == digest_of(branch)]

    def receipt(self) -> Receipt:
        """Compare the original with when it was augmented: SHA-256 of every parameter and buffer, and its function."""
        now, altered = self.engine.backbone.digests(), tuple(self.engine.backbone.altered)
        return Receipt(self._before, now, altered, self.own_base)

    def rebase(self) -> None:
        """Make the current weights the new base: reset the receipt and store them on save.

        For a copy whose original was trained, `train(..., joint=True)`; never for an original that is shared.
        """
        self._before, self.own_base = self.engine.backbone.digests(), True
        self.engine.backbone.accept()

    def transform(self, is_training: bool = False) -> Callable[[Image.Image], Tensor]:
        """From a PIL picture to the pixels (3, H, W) that the original takes: what a dataset is given as transform.

        For a timm model its `timm.data` transforms as the adapter states them; for one of transformers its image
        processor, the saved one or else the one under its name.

        Args:
            is_training: with timm's random crops and flips.
        Raises:
            DataError: nothing says how its pictures are prepared, or augmented.
        """
        own = {"preprocessing": self.preprocessing, "processor": self.processor}
        return picture_transform(self.engine.backbone, **own, is_training=is_training)

    def adapter_config(self) -> AdapterConfig:
        """Everything about the branches that is not a tensor."""
        return AdapterConfig.of(self.engine, self.specs, self.state, self._before)

    def save_pretrained(self, folder: str | os.PathLike[str], *, processor: Any = None, **card: Any) -> Path:
        """Write the adapter folder: branches, plan, operating points and a model card; never the original's weights.

        Only the new base made by `train(..., joint=True)` is stored too. All files change at once or not at
        all. An adapter that is there already is replaced. Of several processes, the main one alone writes.

        Args:
            processor: the original's image processor or tokenizer in transformers, saved along so that `pipeline`
                finds it. Left out, the image processor comes from the local cache, where the original was loaded by
                its name; where it is not there, `pipeline` has to be given one. timm models need none.
            card: what the model card shall say beyond the folder's own data, kept for the next save: `license`,
                `datasets`, `language`, `tags`, `pipeline_tag`, `repo_id`, and of the data that `evaluate` was given
                `eval_dataset`, `eval_name`, `eval_split`, `eval_task`; see `CardInfo`.
        Raises:
            ConfigError: a card keyword that is unknown, or no text.
            AdapterError: the folder holds a model that is not an adapter of ours, or cannot be written.
        """
        folder = path("folder", folder)
        if _beside_the_main_process():
            return folder
        state, backbone = self.state, self.engine.backbone
        state.processor = state.processor if processor is None else processor
        config = self.adapter_config()
        about = CardInfo.stored(config, card).to_dict()
        state.provenance.pop("card", None)
        state.provenance |= {"card": about} if about else {}
        receipt = self.receipt()
        # Of an original that was changed, the fingerprint is of before: what it computes now would not fit.
        probe = Probe.of(backbone, config.inputs, config.options) if receipt.unchanged else None
        packages = {spec.name: package for spec in self.specs if (package := BRANCHES.package(spec.name))}
        about_now = {"receipt": str(receipt), "untrained": self.untrained, "packages": packages}
        config = replace(config, provenance={**state.provenance, **about_now}, probe=probe)
        base = backbone.model if state.own_base else None
        with change_adapter(folder) as change:
            save_adapter(change, config, self.branches.state_dict(), state.frontier, base)
            save_processor(change, state.processor or find_processor(backbone, cached=True), backbone)
            save_card(change, config, state.frontier, str(receipt), CardInfo.stored(config, {}))
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str = "Upload early exits",
        create_pr: bool = False,
        **card: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; see `push_folder`.

        The image processor of a transformers base goes along, downloaded where it is not in the cache.

        Returns:
            Where to look at the commit, or at the pull request; nothing in processes beside the main one, which alone
            uploads.
        Raises:
            AdapterError: the repository holds another model, which the adapter would make unreadable.
            HubError: no such user, no right to write, no connection; the repository holds what it held before.
        """
        word("repo_id", repo_id, hint="Such as user/name.")
        if _beside_the_main_process():
            return ""
        hub = {"private": private, "token": token, "revision": revision, "message": message, "create_pr": create_pr}
        self.processor = self.processor or find_processor(self.engine.backbone, cached=False)
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder, **{"repo_id": repo_id, **card}), repo_id, **hub)


def _beside_the_main_process() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


@dataclass(frozen=True)
class Loaded:
    """What was read of an adapter, with its base."""

    backbone: Backbone
    config: AdapterConfig
    weights: Weights
    """Of the branches, still in their file."""
    state: AdapterState
    """Without the operating point, which is to be checked against the branches first."""
    same: bool
    """Whether the base is the one that the adapter belongs to."""


def load(
    source: str | os.PathLike[str],
    model: nn.Module | None,
    *,
    sample: Sample | None,
    output: OutputKey | None,
    revision: str | None,
    other_base: bool,
    own_base: bool,
    **hub: Any,
) -> Loaded:
    """Read an adapter folder or repository, and make or check its base: `from_pretrained`, whose arguments these are.

    Args:
        hub: `token`, `cache_dir`, `local_files_only`.
    """
    folder = path("source", source, hint="A folder written by save_pretrained, or a repository such as user/name.")
    local = folder.is_dir()
    if not local:
        folder = fetch(str(source), revision=revision, **hub)
    model = None if model is None else unwrapped(model)
    config, weights, frontier = load_adapter(folder)
    task = _task(config, folder)  # a name that is known, before anything is downloaded
    model = _base(config, folder, model, source, expected=own_base, **hub)
    if sample is None:
        sample = make_inputs(config.inputs, config.options)
    if unknown := sorted(set(config.opaque) - {name for name, _ in model.named_modules()}):
        raise AdapterError(
            f"{folder} keeps modules {unknown[:5]} whole, but {type(model).__name__} does not have them."
        )
    place = config.output if output is None else output
    backbone = Backbone(model, sample, config.opaque, config.head_classes, place, task)
    calibrated = frontier is not None or config.operating_point is not None
    name = folder.resolve().name if local else str(source)
    provenance = as_stated(config.provenance, name, calibrated=calibrated)
    if (differ := _difference(config, backbone)) is not None:
        if not other_base:
            raise FingerprintError(" ".join(differ))
        message = f"{differ[0]} other_base=True: earlier measurements do not hold, calibrate again."
        warnings.warn(message, SurgeryWarning, stacklevel=3)
        provenance.pop("evaluation", None)
        provenance["other_base"] = {"trained_on": config.base.fingerprint, "model_id": config.base.model_id}
    state = AdapterState(
        own_base=config.own_base,
        provenance=provenance,
        preprocessing=load_preprocessing(folder, config.preprocessing) or backbone.preprocessing,
        processor=load_processor(folder, config.files, backbone),
        frontier=frontier,
    )
    return Loaded(backbone, config, weights, state, same=differ is None)


def _task(config: AdapterConfig, folder: Path) -> Task:
    """The stored task, its options checked.

    Raises:
        AdapterError: there are no such options.
        UnknownNameError: no such task.
    """
    as_task(config.task)
    try:
        return stored_task(config.task, config.task_options)
    except ConfigError as error:
        raise AdapterError(f"{folder} states a task that cannot be: {error} Save the adapter again.") from error


def _base(
    config: AdapterConfig,
    folder: Path,
    given: nn.Module | None,
    source: str | os.PathLike[str],
    expected: bool,
    **hub: Any,
) -> nn.Module:
    """The base that was given or that the adapter names, with the weights stored in the folder where there are any."""
    model = make_base(config, folder, **hub) if given is None else given
    if not config.own_base:
        return model
    if not expected:
        warnings.warn(
            f"{source} does not use the published {config.base.hub_id or config.base.model_id!r}: it has its own base "
            "weights, which will be used. Pass own_base=True if you expect this.",
            SurgeryWarning,
            stacklevel=4,
        )
    model = model if given is None else deepcopy(model)
    load_base(folder, model, config.files)
    return model


def _difference(config: AdapterConfig, backbone: Backbone) -> tuple[str, str] | None:
    """How a base is not the one that an adapter belongs to, in weights or in what it computes, and what to do."""
    base, identity = config.base, backbone.identity()
    advice = "Load the very same weights (same checkpoint, dtype and number of classes)."
    if identity.adapters != base.adapters:
        states = (one.adapters or "no PEFT adapters" for one in (base, identity))
        advice = "The branches were made with {}; the model given has {}. Load and activate the same.".format(*states)
    if identity.fingerprint != base.fingerprint:
        return (
            f"These branches belong to {base.model_id} with fingerprint {base.fingerprint}; the model given is "
            f"{identity.model_id} with fingerprint {identity.fingerprint}.",
            advice,
        )
    answers = config.probe and config.probe.difference(backbone, config.inputs, config.options)
    if not answers:
        return None
    if identity.adapters == base.adapters:
        saved = ", ".join(f"{name} {version}" for name, version in config.versions.items())
        advice = (
            "Something other than tensors differs: an activation, pooling, stride or dilation, an epsilon, the number "
            f"of heads, a hook, or the version of a library (saved with {saved}). Build the base as it was built then."
        )
    return (
        f"The {identity.model_id} given has the weights of the one that these branches belong to (fingerprint "
        f"{base.fingerprint}), but computes something different: {answers}.",
        advice,
    )
