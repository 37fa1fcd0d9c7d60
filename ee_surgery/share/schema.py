"""Schemas of the JSON files of an adapter. The files are untrusted: what passes is typed, bounded and consistent.

Nothing is allocated for a number before it has passed here: shapes, counts, depths and widths are capped. Names are
printable and short, so that errors can quote them. Unknown keys are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from ee_surgery.backbone.base import Library
from ee_surgery.errors import AdapterError
from ee_surgery.graph.features import Layout
from ee_surgery.policies.policy import Fallback
from ee_surgery.share.json_files import FORMAT_VERSION, OLD_FORMAT
from ee_surgery.task import CLASSIFICATION, TASKS

_MOST_CLASSES = 100_000
_MOST_ELEMENTS = 1 << 24  # of an input tensor: four samples of 3 x 1182 x 1182
_DEEPEST = 12  # levels of nested data without a schema

Typed = TypeVar("Typed", bound=BaseModel)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("contains unprintable characters")
    return text


def _plain(value: Any, depth: int = 0) -> Any:
    """Data without a schema: finite numbers, strings, and lists and objects of them, of limited depth."""
    if depth > _DEEPEST:
        raise ValueError(f"is nested more than {_DEEPEST} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("contains a number that is not finite")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _plain(item, depth + 1)
    return value


Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Word: TypeAlias = Annotated[str, Field(max_length=20_000), AfterValidator(_printable)]
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Milliseconds: TypeAlias = Annotated[float, Field(ge=0, le=1e9)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=1 << 62)]
Side: TypeAlias = Annotated[int, Field(ge=1, le=1 << 20)]
Threshold: TypeAlias = Annotated[float, Field(allow_inf_nan=False)] | Literal["inf", "-inf"]
Scalar: TypeAlias = Annotated[int | float, Field(ge=-(1 << 16), le=1 << 16)] | bool | Word
Option: TypeAlias = Scalar | Annotated[list[Scalar], Field(max_length=64)] | None
Plain: TypeAlias = Annotated[dict[str, Any], Field(max_length=1000), AfterValidator(_plain)]
DType: TypeAlias = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TensorForm(_Form):
    """A tensor that a fitted score holds, by its name in the weights file."""

    tensor: Annotated[str, Field(pattern=r"^policy\.[0-9]{1,6}$")]


FittedForm: TypeAlias = Annotated[dict[Name, Any], Field(min_length=1, max_length=20)]


def _fitted(value: dict[str, Any]) -> dict[str, Any]:
    for name, field in value.items():
        items = field if isinstance(field, list) else [field]
        if len(items) > 10_000:
            raise ValueError(f"has {len(items)} values in {name!r}, too many")
        for item in items:
            if isinstance(item, dict):
                TensorForm.model_validate(item)
            elif not isinstance(item, int | float | str) or (isinstance(item, float) and not math.isfinite(item)):
                raise ValueError(f"has something other than numbers, strings and tensors in {name!r}")
    return value


class CertificateForm(_Form):
    """A `Certificate`."""

    risk: Name
    eps: Share
    delta: Share
    method: Name
    thresholds: list[Threshold]
    score: Name
    n: Count
    observed: float
    certified: bool
    bound: float | None
    data: Sha256
    per_exit: bool = False
    seed: int = 0


class PointForm(_Form):
    """An `OperatingPoint`."""

    thresholds: Annotated[list[Threshold], Field(min_length=1, max_length=1000)]
    score: Name | Annotated[FittedForm, AfterValidator(_fitted)]
    accuracy: Share | None
    accuracy_drop: Annotated[float, Field(ge=-1, le=1)] | None
    macs_fraction: Annotated[float, Field(ge=0, le=1000)] | None
    exit_shares: list[Share]
    samples: Count
    rule: Name
    expected_accuracy: Annotated[float, Field(ge=-1, le=2)] | None = None
    fallback: Literal[get_args(Fallback)] = "last"  # pyright: ignore[reportInvalidTypeForm]
    certificate: CertificateForm | None = None
    latency_ms: Milliseconds | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exits, shares = len(self.thresholds), self.exit_shares
        if shares and (len(shares) != exits + 1 or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"{exits} thresholds do not fit the exit shares {shares[:10]}")
        if self.certificate is not None and len(self.certificate.thresholds) != exits:
            raise ValueError(f"{exits} thresholds, but {len(self.certificate.thresholds)} in the certificate")
        if bool(self.samples) == (None in (self.accuracy, self.accuracy_drop, self.macs_fraction) or not shares):
            raise ValueError(f"accuracy, cost and shares do not fit {self.samples} samples")
        return self


class RiskForm(_Form):
    """A `RiskTable`."""

    format_version: Literal[1]
    risk: Name
    score: Name
    points: Annotated[list[PointForm], Field(min_length=1, max_length=10_000)]
    worse: list[Count]
    better: list[Count]
    data: Sha256

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        most = self.points[0].samples
        if not len(self.points) == len(self.worse) == len(self.better):
            raise ValueError(f"{len(self.points)} points, counts of {len(self.worse)} and {len(self.better)}")
        if any(a + b > most for a, b in zip(self.worse, self.better, strict=True)):
            raise ValueError(f"more losses than the {most} samples")
        if any(isinstance(threshold, float) for threshold in self.points[0].thresholds):
            raise ValueError("the first point leaves an exit open")
        return self


class ProfileForm(_Form):
    """A `Profile`."""

    engine: Name
    device: Name
    threads: Annotated[int, Field(ge=0, le=1 << 16)]
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)]
    sizes: Annotated[list[Annotated[int, Field(ge=1, le=1 << 20)]], Field(min_length=1, max_length=100)]
    trunk_ms: list[list[Milliseconds]]
    branch_ms: list[list[Milliseconds]]

    def check(self, exits: int) -> None:
        """Raise ValueError unless it has a time for each of K exits at each size."""
        if self.sizes != sorted(set(self.sizes)) or self.sizes[-1] != self.batch_size:
            raise ValueError(f"the profile's sizes do not rise to its batch size: {self.sizes[:10]}")
        for rows, wanted in ((self.trunk_ms, exits), (self.branch_ms, exits - 1)):
            if len(rows) != len(self.sizes) or any(len(row) != wanted for row in rows):
                raise ValueError(f"the profile does not have one time for each of {exits} exits and each size")
        if any(row != sorted(row) for row in self.trunk_ms):
            raise ValueError("the profile's times do not rise from exit to exit")


class FrontierForm(_Form):
    """A `Frontier`."""

    format_version: Literal[1]
    points: Annotated[list[PointForm], Field(min_length=1, max_length=10_000)]
    base_accuracy: Share
    exits: Annotated[list[Name], Field(min_length=2)]
    exit_accuracies: list[Share]
    exit_macs: list[Annotated[float, Field(ge=0, le=1000)]]
    labelled: bool
    risks: Annotated[list[RiskForm], Field(max_length=20)] = []
    task: Name = CLASSIFICATION.name
    profile: ProfileForm | None = None
    exit_aurocs: list[Share | None] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.exits) == len(self.exit_accuracies) == len(self.exit_macs):
            raise ValueError("accuracies and costs are not one per exit")
        if self.exit_aurocs and len(self.exit_aurocs) != len(self.exits) - 1:
            raise ValueError("AUROCs are not one per branch")
        points = [*self.points, *(point for table in self.risks for point in table.points)]
        if any(len(point.thresholds) != len(self.exits) - 1 for point in points):
            raise ValueError(f"an operating point does not have one threshold for each of {self.exits[:-1][:10]}")
        if any(not point.samples for point in points):
            raise ValueError("an operating point was measured on no samples")
        expected = [math.nan if point.expected_accuracy is None else point.expected_accuracy for point in self.points]
        if self.profile is not None:
            self.profile.check(len(self.exits))
        if any((point.latency_ms is None) != (self.profile is None) for point in self.points):
            raise ValueError("times of operating points and the profile belong together")
        costs = [p.macs_fraction or 0.0 if p.latency_ms is None else p.latency_ms for p in self.points]
        if any(not (a < b and c <= d) for a, b, c, d in zip(expected, expected[1:], costs, costs[1:], strict=False)):
            raise ValueError("operating points are not ordered by cost and expected accuracy")
        if not expected[-1] >= self.base_accuracy - 1e-9:
            raise ValueError("the operating point that never exits early is missing")
        return self


class BranchForm(_Form):
    """A `BranchSpec`."""

    name: Name
    confidence: bool
    options: Annotated[dict[Name, Scalar | None], Field(max_length=50)]


class ExitForm(_Form):
    """An `AdapterExit`."""

    name: Name
    node: Name
    shape: Annotated[list[Side], Field(min_length=1, max_length=4)]
    layout: Literal[get_args(Layout)]  # pyright: ignore[reportInvalidTypeForm]
    branch: BranchForm
    trunk_macs: Count
    branch_macs: Count


class InputForm(_Form):
    """An `InputSpec`."""

    shape: Annotated[list[Side], Field(min_length=1, max_length=6)]
    dtype: DType
    highest: Annotated[int, Field(ge=0, le=1 << 31)]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if math.prod(self.shape) > _MOST_ELEMENTS:
            raise ValueError(
                f"a sample input of shape {tuple(self.shape)} is too large to generate: pass one, sample=..."
            )
        return self


class ProbeForm(_Form):
    """A `Probe`."""

    seed: Count
    logits: Annotated[list[Annotated[list[float], Field(min_length=1, max_length=1000)]], Field(max_length=16)]
    noise: Share
    rounding: Share

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({len(row) for row in self.logits}) != 1:
            raise ValueError("the samples have different numbers of logits, or there are none")
        return self


class BaseForm(_Form):
    """An `Identity`."""

    library: Literal[get_args(Library)]  # pyright: ignore[reportInvalidTypeForm]
    model_id: Name
    revision: Name | None
    fingerprint: Sha256
    num_classes: Annotated[int, Field(ge=0, le=_MOST_CLASSES)]
    architecture: Annotated[str, Field(max_length=500), AfterValidator(_printable)] = ""
    hub_id: Name | None = None
    adapters: Annotated[str, Field(max_length=500), AfterValidator(_printable)] = ""


class ConfigForm(_Form):
    """`config.json`: an `AdapterConfig`, and keys that other libraries look for in that file."""

    model_type: Literal["ee_surgery"]
    format_version: Literal[OLD_FORMAT, FORMAT_VERSION]  # pyright: ignore[reportInvalidTypeForm]
    image_processor_type: Literal["TimmWrapperImageProcessor"] | None = None
    pretrained_cfg: Plain | None = None
    base: BaseForm
    inputs: Annotated[dict[Name, InputForm], Field(min_length=1, max_length=16)]
    options: Annotated[dict[Annotated[Name, Field(pattern=r"^[A-Za-z]\w*$")], Option], Field(max_length=50)]
    opaque: Annotated[list[Name], Field(max_length=1000)]
    head_classes: Annotated[int, Field(ge=1, le=_MOST_CLASSES)] | None
    placement: Name
    base_macs: Annotated[int, Field(ge=1, le=1 << 62)]
    exits: Annotated[list[ExitForm], Field(min_length=1, max_length=1000)]
    operating_point: PointForm | None
    label_names: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=_MOST_CLASSES)] | None
    versions: Annotated[dict[Name, Name], Field(max_length=50)]
    own_base: bool = False
    preprocessing: Plain | None = None
    output: int | Name | Annotated[list[int | Name], Field(min_length=1, max_length=10)] | None = None
    provenance: Plain = {}
    task: Name = CLASSIFICATION.name
    task_options: Plain = {}
    probe: ProbeForm | None = None
    files: Annotated[dict[Name, Sha256], Field(max_length=100)] = {}
    digest: Sha256 | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names, costs = [exit.name for exit in self.exits], [exit.trunk_macs for exit in self.exits]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"duplicate exits: {twice[:5]}")
        if costs != sorted(costs) or costs[-1] > self.base_macs:
            raise ValueError(f"exits are out of order: MACs up to each are {costs[:10]} of {self.base_macs}")
        least = TASKS[self.task].least if self.task in TASKS else 1
        if self.head_classes is not None and self.head_classes < least:
            raise ValueError(f"a head of {self.head_classes} classes, and the task {self.task!r} has {least} or more")
        point = self.operating_point
        if point is not None and len(point.thresholds) != len(names):
            raise ValueError(f"{len(point.thresholds)} thresholds for {len(names)} exits")
        if self.pretrained_cfg != (self.preprocessing if self.image_processor_type else None):
            raise ValueError("pretrained_cfg and preprocessing differ")
        return self


def parse(form: type[Typed], data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Validate plain data against a schema, and fill in defaults.

    Raises:
        AdapterError: the data is invalid; names the first wrong key.
    """
    try:
        return form.model_validate(data).model_dump()
    except ValidationError as error:
        raise AdapterError(f"{path} is damaged: {_first(error)}. Save the adapter again.") from error


def _first(error: ValidationError) -> str:
    """The first validation error, at most a few lines long."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(str(part)[:60] for part in found[0]["loc"][:8])
    return f"{where!r}: {found[0]['msg'][:300]}" if where else found[0]["msg"][:300]
