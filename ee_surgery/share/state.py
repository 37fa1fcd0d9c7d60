"""What belongs to a model with branches beside graph, plan and weights, in one place, so that none of it gets lost."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, overload

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.share.provenance import forget_measured

T = TypeVar("T")


@dataclass
class AdapterState:
    """The state that travels with the branches: into a copy, a saved folder and back, and through training."""

    own_base: bool = False
    """Whether the original is a copy that was trained, and so is saved along."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the branches come from, as plain data: `training`, `calibration`, `evaluation`, `other_base`, `card`."""
    preprocessing: dict[str, Any] | None = None
    """What `timm.data.create_transform` takes to prepare pictures, where timm knows the original."""
    processor: Any = None
    """The image processor or tokenizer of transformers that was saved along, or will be."""
    frontier: Frontier | None = None
    """What calibration found."""
    operating_point: OperatingPoint | None = None
    """The one that was set last; None: no sample leaves early. Set by `operate`, which checks it."""

    def copy(self) -> AdapterState:
        """All of it, for an independent model."""
        return replace(self, provenance=deepcopy(self.provenance), preprocessing=deepcopy(self.preprocessing))

    def forget_measured(self) -> None:
        """Drop what holds for these weights and exits alone: frontier, operating point, what was measured with them."""
        self.frontier = self.operating_point = None
        forget_measured(self.provenance)

    def unmeasured(self) -> AdapterState:
        """A copy for other exits or weights, without what was measured."""
        found = self.copy()
        found.forget_measured()
        return found


class _Stateful(Protocol):
    state: AdapterState


class Carried(Generic[T]):
    """A field of `AdapterState`, as an attribute of the model that has it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, model: None, owner: type) -> Carried[T]: ...
    @overload
    def __get__(self, model: _Stateful, owner: type) -> T: ...
    def __get__(self, model: _Stateful | None, owner: type) -> T | Carried[T]:
        return self if model is None else getattr(model.state, self.name)

    def __set__(self, model: _Stateful, value: T) -> None:
        setattr(model.state, self.name, value)
