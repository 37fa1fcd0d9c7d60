"""Branches: features of one exit in, logits and an optional confidence out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.scaled import Scaled
from ee_surgery.checks import flag, instance, number, refuse, word
from ee_surgery.errors import BranchError, ConfigError, SurgeryError
from ee_surgery.graph.cost import module_macs
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.registry import Registry
from ee_surgery.task import TaskNames

Option = int | float | str | bool
Reads: TypeAlias = Literal["features", "maps", "live"]


class ExitLogits(NamedTuple):
    """Outputs of one exit for a batch."""

    logits: Tensor
    """Shape (B, C); of maps (B, C, h, w), on a grid of the branch's own."""
    confidence: Tensor | None = None
    """Logit of the confidence unit, shape (B,); None for branches without one."""
    log_probs: Tensor | None = None
    """log p of this branch and of those before it, for the next one to read, (B, so far, C); None where none does."""


@dataclass(frozen=True)
class PreparedBranch:
    """Branch state for one input signature (shape, dtype, device); cached with the program for that signature."""

    macs: int
    """Of one sample."""
    code: object = None


@dataclass(frozen=True)
class BranchSpec:
    """A branch to build: plain data, so that it can be saved and built again.

    >>> BranchSpec("conv2", confidence=True)
    BranchSpec(name='conv2', confidence=True, options={})
    """

    name: str = "auto"
    """A registered name, or `auto`."""
    confidence: bool = False
    """Add a confidence unit: a second linear layer on the vector that feeds the classifier (PTEENet, EENets)."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Keyword arguments of the branch class."""

    def __post_init__(self) -> None:
        word("name", self.name)
        flag("confidence", self.confidence)
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            refuse("options", "a dict of options by name", self.options)
        plainly = {name: _option(name, value) for name, value in self.options.items()}
        object.__setattr__(self, "options", plainly)

    @classmethod
    def of(cls, branch: BranchSpec | str) -> BranchSpec:
        """A spec as it is, a name as a spec without options.

        Raises:
            ConfigError: it is neither.
        """
        instance("branch", branch, (BranchSpec, str), hint=f"Names: auto, {', '.join(BRANCHES)}.")
        return branch if isinstance(branch, BranchSpec) else cls(branch)


def _option(name: str, value: object) -> Option:
    """An option as plain data, which can be saved."""
    if isinstance(value, (str, bool)):
        return value
    return number(f"option {name}", value, hint="Options are numbers, words or flags.")


class Branch(nn.Module, ABC):
    """Base of all branches. A subclass builds a body that turns features into `width` numbers per sample.

    One that is `chained` also takes `previous=`, the `log_probs` of the branch before it, and returns its own.

    Args:
        point: the exit it is for: shape and layout of the features.
        num_classes: C.
        confidence: add a confidence unit on the same vector.
    """

    chained: ClassVar[bool] = False
    reads: ClassVar[Reads] = "features"
    """What it takes: the features; all `maps` that cross the exit, as (B, C, h, w); or every `live` tensor there. All
    but the first are made with `graph=`."""
    copies: ClassVar[bool] = False
    """Is made of parts of the original, and so no larger, whatever its options."""
    rank: ClassVar[int | None] = 2
    """How many dimensions its logits have; None: as many as the original's."""
    any_layout: ClassVar[bool] = False
    """Takes features of every layout. Where False, a preset puts a `token` branch where the features are no map."""
    tasks: ClassVar[TaskNames] = None
    """The tasks that it is for; None: all, as its logits are what they make of them."""

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool, width: int) -> None:
        super().__init__()
        self.layout = point.layout
        self.prefix_tokens = point.prefix_tokens
        self.classifier = nn.Linear(width, num_classes)
        self.confidence = nn.Linear(width, 1) if confidence else None

    @abstractmethod
    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of shape (B, *point.shape) to vectors of shape (B, width).

        Args:
            mask: 1 for a token and 0 for padding, (B, tokens), where the model has one.
        """

    def forward(self, features: Tensor, mask: Tensor | None = None) -> ExitLogits:
        """Logits of shape (B, C) and, if built with one, the confidence logit of shape (B,)."""
        features = self.in_own_type(features)
        return self.answer(self.vector(features) if mask is None else self.vector(features, mask))

    def in_own_type(self, features: Tensor) -> Tensor:
        """Features in the type of the branch's weights: those of an autocast region inside a forward are of another.

        Where the caller's own autocast is on, it picks types, and nothing is changed.
        """
        own = self.classifier.weight.dtype
        if features.dtype == own or torch.is_autocast_enabled(features.device.type):
            return features
        return features.to(own)

    def answer(self, vector: Tensor) -> ExitLogits:
        """The linear layers on a vector (B, width), or on each pixel of a map (B, width, h, w)."""
        confidence = None
        if self.confidence is not None:
            pooled = vector if vector.ndim == 2 else vector.flatten(2).mean(2)
            confidence = self.confidence(pooled).squeeze(-1)
        return ExitLogits(self.classifier(vector), confidence)

    def macs(self, shape: tuple[int, ...]) -> int:
        """MACs for the features of one sample, shape without the batch."""
        return module_macs(self, shape)

    def prepare(self, graph: ModelGraph, point: ExitPoint) -> PreparedBranch:
        """Get ready for inputs of the size, dtype and device that `graph` was read for."""
        return PreparedBranch(self.macs(point.shape))

    def traceable(self, prepared: PreparedBranch) -> nn.Module:
        """What torch.compile reads in its place, over the same tensors and called alike: the branch itself."""
        return self

    def resolved_options(self) -> Mapping[str, Option]:
        """Resolved options: pass them to rebuild this exact branch."""
        return {}


def append_log_probs(logits: Tensor, previous: Tensor | None) -> Tensor:
    """What the next branch of a chain reads: log p of these logits (B, C) behind those before, (B, so far, C)."""
    own = F.log_softmax(logits, -1)[:, None]
    return own if previous is None else torch.cat([previous, own], 1)


def run_branch(branch: Branch, read: tuple[Tensor, ...], previous: Tensor | None) -> ExitLogits:
    """The answer of one branch of a chain; one that is not `chained` itself hands its answer on all the same."""
    if branch.chained:
        return branch(*read, previous=previous)
    answer = branch(*read)
    return answer._replace(log_probs=append_log_probs(answer.logits, previous))


BRANCHES: Registry[type[Branch]] = Registry("branch", "ee_surgery.branches")
"""Name -> class taking (point, num_classes, confidence=..., **options). Register your own."""


def known(branch: str | BranchSpec | Sequence[str | BranchSpec]) -> list[BranchSpec]:
    """One or several branches as specs, of names that are registered.

    Raises:
        ConfigError: something else.
        UnknownNameError: no branch of that name.
    """
    given = branch if isinstance(branch, Sequence) and not isinstance(branch, str) else [branch]
    specs = [BranchSpec.of(each) for each in given]
    for spec in specs:
        if spec.name != "auto":
            BRANCHES[spec.name]
    return specs


def build(
    spec: BranchSpec, point: ExitPoint, num_classes: int, depth: int = 0, graph: ModelGraph | None = None
) -> Branch:
    """Build the branch of `spec` for one exit.

    Args:
        depth: how many branches come before it; a chained branch is made for that many.
        graph: of the original, for branches that are cut from it.
    Raises:
        UnknownNameError: no branch of that name.
        BranchError: it does not fit the features there, or needs the graph.
        ConfigError: an option that it does not know, or cannot be built with.
    """
    cls = BRANCHES[spec.name]
    place: dict[str, object] = {"before": depth} if cls.chained else {}
    if cls.reads != "features":
        if graph is None:
            raise BranchError(f"Branch {spec.name!r} is made from a model's graph: put it there with `attach`.")
        place["graph"] = graph

    def make() -> Branch:
        made = cls(point, num_classes, spec.confidence, **spec.options, **place)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if graph is not None and graph.backbone.task.scaled and not cls.copies:
            made.classifier = Scaled(made.classifier, num_classes)  # pyright: ignore[reportAttributeAccessIssue]
        return made

    try:
        if spec.options and not cls.copies:
            _check_size(make, spec)
        return make()
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        if isinstance(error, SurgeryError):
            raise
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"Branch {spec.name!r} does not take {dict(spec.options)} at {point.name!r}: {told}"
        ) from error


def _check_size(make: Callable[[], nn.Module], spec: BranchSpec) -> None:
    """Check the size of a branch on the meta device.

    Raises:
        ConfigError: it is far larger than any that saves something.
    """
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in make().parameters())
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        return  # made from data: it cannot be measured before
    if size > _LARGEST:
        raise ConfigError(
            f"Branch {spec.name!r} with {dict(spec.options)} would have {size:.3g} parameters, more than "
            f"{_LARGEST:.0g}: ask for less."
        )


_LARGEST = 1e9  # parameters of one branch: most originals have fewer
DEEPEST = 100
"""Layers that a branch may have: of more, the first would be as far from the loss as those of the original."""


def channels(point: ExitPoint) -> int:
    """Number of channels of the features at an exit."""
    return point.shape[0] if point.layout in ("nchw", "vector") else point.shape[-1]


def grid(point: ExitPoint) -> tuple[int, int] | None:
    """Height and width of the feature map; for tokens the square that their patches form; None where there is none."""
    if point.layout == "nchw":
        return point.shape[1], point.shape[2]
    if point.layout == "nhwc":
        return point.shape[0], point.shape[1]
    if point.layout == "tokens":
        side = math.isqrt(point.shape[0] - point.prefix_tokens)
        return (side, side) if side * side == point.shape[0] - point.prefix_tokens and side > 1 else None
    return None


def require_grid(name: str, point: ExitPoint) -> tuple[int, int]:
    """The grid, or an error that says what to use instead.

    Raises:
        BranchError: the features are no map.
    """
    size = grid(point)
    if size is None:
        raise BranchError(
            f"Branch {name!r} needs a feature map, but exit {point.name!r} has {point.layout} of shape {point.shape}. "
            "Use 'pool', 'token' or 'auto' there."
        )
    return size


def to_nchw(features: Tensor, layout: str, prefix_tokens: int) -> Tensor:
    """A feature map of any layout as (B, C, H, W); tokens in front of the patches are left out."""
    if layout == "nchw":
        return features
    if layout == "nhwc":
        return features.permute(0, 3, 1, 2)
    patches = features[:, prefix_tokens:].transpose(1, 2)  # (B, C, H * W)
    side = math.isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


def mixed_pool(features: Tensor, cells: int, share: Tensor) -> Tensor:
    """`share` of the largest value and the rest of the mean in each of cells x cells places, flat: (B, C * cells^2)."""
    largest, mean = F.adaptive_max_pool2d(features, cells), F.adaptive_avg_pool2d(features, cells)
    return (share * largest + (1 - share) * mean).flatten(1)


_PLACES = {"nchw": (2, 3), "nhwc": (1, 2), "tokens": (1,), "sequence": (1,)}


def pooled(features: Tensor, layout: str, mask: Tensor | None = None) -> Tensor:
    """Mean over all places, padding left out: (B, C)."""
    if layout == "vector":
        return features
    if mask is None:
        return features.mean(_PLACES[layout])
    weights = mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(1) / weights.sum(1).clamp_min(1)


def summary(features: Tensor, layout: str, prefix_tokens: int, mask: Tensor | None = None) -> Tensor:
    """The class token beside the mean of the patches, (B, 2 C); the mean alone where there is no such token, (B, C)."""
    n = prefix_tokens
    if not n:
        return pooled(features, layout, mask)
    patches = pooled(features[:, n:], layout, None if mask is None else mask[:, n:])
    return torch.cat([features[:, 0], patches], dim=1)
