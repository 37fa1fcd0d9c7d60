"""Early exit for any pretrained vision model: inspect -> place -> attach -> train -> calibrate -> run -> save."""

from ee_surgery.attach import attach
from ee_surgery.branches import BRANCHES, Branch, BranchSpec, ExitLogits
from ee_surgery.calibration.budget import geometric_budget
from ee_surgery.calibration.cascade import accuracy_drop_rule
from ee_surgery.calibration.classwise import class_thresholds
from ee_surgery.calibration.eenet import eenet_scheduler
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.methods import CALIBRATORS
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.calibration.risk import RISKS, check_certificate, risk_control
from ee_surgery.calibration.search import realised_drop
from ee_surgery.calibration.temperature import scale_temperatures
from ee_surgery.checks import renamed as _renamed
from ee_surgery.data.batches import batches, unlabelled
from ee_surgery.errors import (
    AdapterError,
    BranchError,
    CaptureError,
    ConfigError,
    DataError,
    ExitPointError,
    FingerprintError,
    HubError,
    OperatingPointError,
    SurgeryError,
    SurgeryWarning,
    TrainingError,
    UnknownNameError,
    WriteError,
)
from ee_surgery.evaluation.calibrate import calibrate
from ee_surgery.evaluation.evaluate import Evaluation, evaluate
from ee_surgery.evaluation.record import record
from ee_surgery.evaluation.verdict import Verdict, verdict
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.inspection import inspect
from ee_surgery.integrations import register as _register
from ee_surgery.model import EarlyExitModel
from ee_surgery.pipeline import augment, from_pretrained
from ee_surgery.placement import PLACEMENTS, ExitPlan, place
from ee_surgery.policies.certificate import Certificate
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import FITTED_SCORES, SCORES, FittedScore
from ee_surgery.presets import PRESETS, Preset
from ee_surgery.receipt import Receipt
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.search.exit_search import ExitSearch, prune_exits, search_exits
from ee_surgery.search.exit_subset import Subset, cheapest_exits
from ee_surgery.task import TASKS, Classification, MultiLabel, Task
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.loop import TrainReport, train
from ee_surgery.training.objectives import OBJECTIVES

__version__ = "0.1.0"

__all__ = [
    "BRANCHES",
    "CALIBRATORS",
    "FITTED_SCORES",
    "OBJECTIVES",
    "PLACEMENTS",
    "PRESETS",
    "RISKS",
    "SCORES",
    "TASKS",
    "AdapterError",
    "Branch",
    "BranchError",
    "BranchSpec",
    "CaptureError",
    "Certificate",
    "Classification",
    "ConfigError",
    "DataError",
    "EarlyExitModel",
    "Evaluation",
    "ExitLogits",
    "ExitOutput",
    "ExitPlan",
    "ExitPoint",
    "ExitPointError",
    "ExitRecords",
    "ExitSearch",
    "FingerprintError",
    "FittedScore",
    "Frontier",
    "HubError",
    "ModelGraph",
    "MultiLabel",
    "OperatingPoint",
    "OperatingPointError",
    "Preset",
    "Receipt",
    "Subset",
    "SurgeryError",
    "SurgeryWarning",
    "Task",
    "ThresholdPolicy",
    "TrainConfig",
    "TrainReport",
    "TrainingError",
    "UnknownNameError",
    "Verdict",
    "WriteError",
    "accuracy_drop_rule",
    "attach",
    "augment",
    "batches",
    "calibrate",
    "cheapest_exits",
    "check_certificate",
    "class_thresholds",
    "eenet_scheduler",
    "evaluate",
    "from_pretrained",
    "geometric_budget",
    "inspect",
    "place",
    "prune_exits",
    "realised_drop",
    "record",
    "risk_control",
    "scale_temperatures",
    "search_exits",
    "train",
    "unlabelled",
    "verdict",
]


def __getattr__(name: str) -> object:
    if name == "POLICIES":
        return _renamed("ee.POLICIES", CALIBRATORS, "ee.CALIBRATORS", CALIBRATORS)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()  # with transformers, as soon as it is imported
