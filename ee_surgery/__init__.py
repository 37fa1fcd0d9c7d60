"""Early exit for any pretrained vision model: inspect -> place -> attach -> train -> calibrate -> run -> save."""

from ee_surgery.attach import attach
from ee_surgery.branches import BRANCHES, Branch, BranchSpec, ExitLogits
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
from ee_surgery.graph.points import ExitPoint, ModelGraph, inspect
from ee_surgery.integrations import register as _register
from ee_surgery.model import EarlyExitModel
from ee_surgery.pipeline import augment, from_pretrained
from ee_surgery.placement import PLACEMENTS, ExitPlan, place
from ee_surgery.policies.budget import geometric_budget
from ee_surgery.policies.cascade import accuracy_drop_rule
from ee_surgery.policies.catalogue import POLICIES
from ee_surgery.policies.certificate import Certificate
from ee_surgery.policies.classwise import class_thresholds
from ee_surgery.policies.eenet import eenet_scheduler
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.records import ExitRecords
from ee_surgery.policies.risk import RISKS, check_certificate, risk_control
from ee_surgery.policies.scores import FITTED_SCORES, SCORES, FittedScore
from ee_surgery.policies.search import realised_drop
from ee_surgery.policies.subset import Subset, cheapest_exits
from ee_surgery.policies.temperature import scale_temperatures
from ee_surgery.presets import PRESETS, Preset
from ee_surgery.receipt import Receipt
from ee_surgery.runtime.routed import ExitOutput
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.data import batches, unlabelled
from ee_surgery.training.loop import TrainReport, train
from ee_surgery.training.objectives import OBJECTIVES
from ee_surgery.training.placing import ExitSearch, prune_exits, search_exits
from ee_surgery.training.record import Evaluation, calibrate, evaluate, record
from ee_surgery.training.verdict import Verdict, verdict

__version__ = "0.1.0"

__all__ = [
    "BRANCHES",
    "FITTED_SCORES",
    "OBJECTIVES",
    "PLACEMENTS",
    "POLICIES",
    "PRESETS",
    "RISKS",
    "SCORES",
    "AdapterError",
    "Branch",
    "BranchError",
    "BranchSpec",
    "CaptureError",
    "Certificate",
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
    "OperatingPoint",
    "OperatingPointError",
    "Preset",
    "Receipt",
    "Subset",
    "SurgeryError",
    "SurgeryWarning",
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

_register()  # with transformers, as soon as it is imported
