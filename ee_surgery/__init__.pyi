# The public names and where they are; `__init__.py` reads them from here, so that importing costs nothing.

from .attachment import attach
from .branches import BRANCHES, Branch, BranchSpec, ExitLogits
from .calibration.budget import geometric_budget
from .calibration.cascade import accuracy_drop_rule
from .calibration.classwise import class_thresholds
from .calibration.eenet import eenet_scheduler
from .calibration.failure import failure_auroc
from .calibration.frontier import Frontier
from .calibration.methods import CALIBRATORS
from .calibration.profile import Profile
from .calibration.records import ExitRecords, replay_point
from .calibration.risk import RISKS, check_certificate, risk_control
from .calibration.search import realised_drop
from .calibration.temperature import scale_temperatures
from .data.augmented import AugmentedBatches
from .data.batches import batches, unlabelled
from .errors import (
    AdapterError,
    BranchError,
    CaptureError,
    ConfigError,
    DataError,
    ExitPointError,
    FingerprintError,
    HubError,
    OperatingPointError,
    QueueFullError,
    RequestTimeoutError,
    ServingError,
    SurgeryError,
    SurgeryWarning,
    TrainingError,
    UnknownNameError,
    WriteError,
)
from .evaluation.bench import Bench, Measurement, bench, measure
from .evaluation.calibrate import calibrate
from .evaluation.check_export import check_export
from .evaluation.compare import Comparison, compare
from .evaluation.engines import ENGINES
from .evaluation.estimate import Estimate, estimate
from .evaluation.evaluate import Evaluation, evaluate
from .evaluation.plot import plot
from .evaluation.profile import profile
from .evaluation.record import record
from .evaluation.report import report
from .evaluation.verdict import Verdict, verdict
from .export.verify import ExportCheck
from .graph.exit_points import ExitPoint, ModelGraph
from .graph.inspection import inspect
from .model import EarlyExitModel
from .monitoring.audit import Audit
from .monitoring.report import AuditReport
from .monitoring.state import Alarm, AuditState
from .pipeline import augment, from_pretrained
from .placement import PLACEMENTS, ExitPlan, place
from .policies.certificate import Certificate
from .policies.operating_point import OperatingPoint
from .policies.policy import ThresholdPolicy
from .policies.scores import FITTED_SCORES, SCORES, FittedScore
from .presets import PRESETS, Preset
from .receipt import Receipt
from .runtime.router import ExitOutput
from .search.effort import EFFORTS, Effort
from .search.exit_search import ExitSearch, prune_exits, search_exits
from .search.exit_subset import Subset, cheapest_exits
from .serving.app import serve_app
from .serving.engine import Engine, EngineStats
from .serving.limits import HttpLimits
from .task import (
    TASKS,
    Classification,
    Embedding,
    Gallery,
    MapRegression,
    MultiLabel,
    Regression,
    Segmentation,
    SegmentationIoU,
    Task,
)
from .training.config import TrainConfig
from .training.loop import TrainReport, train
from .training.objectives import OBJECTIVES

__version__: str

__all__ = [
    "BRANCHES",
    "CALIBRATORS",
    "EFFORTS",
    "ENGINES",
    "FITTED_SCORES",
    "OBJECTIVES",
    "PLACEMENTS",
    "PRESETS",
    "RISKS",
    "SCORES",
    "TASKS",
    "AdapterError",
    "Alarm",
    "Audit",
    "AuditReport",
    "AuditState",
    "AugmentedBatches",
    "Bench",
    "Branch",
    "BranchError",
    "BranchSpec",
    "CaptureError",
    "Certificate",
    "Classification",
    "Comparison",
    "ConfigError",
    "DataError",
    "EarlyExitModel",
    "Effort",
    "Embedding",
    "Engine",
    "EngineStats",
    "Estimate",
    "Evaluation",
    "ExitLogits",
    "ExitOutput",
    "ExitPlan",
    "ExitPoint",
    "ExitPointError",
    "ExitRecords",
    "ExitSearch",
    "ExportCheck",
    "FingerprintError",
    "FittedScore",
    "Frontier",
    "Gallery",
    "HttpLimits",
    "HubError",
    "MapRegression",
    "Measurement",
    "ModelGraph",
    "MultiLabel",
    "OperatingPoint",
    "OperatingPointError",
    "Preset",
    "Profile",
    "QueueFullError",
    "Receipt",
    "Regression",
    "RequestTimeoutError",
    "Segmentation",
    "SegmentationIoU",
    "ServingError",
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
    "bench",
    "calibrate",
    "cheapest_exits",
    "check_certificate",
    "check_export",
    "class_thresholds",
    "compare",
    "eenet_scheduler",
    "estimate",
    "evaluate",
    "failure_auroc",
    "from_pretrained",
    "geometric_budget",
    "inspect",
    "measure",
    "place",
    "plot",
    "profile",
    "prune_exits",
    "realised_drop",
    "record",
    "replay_point",
    "report",
    "risk_control",
    "scale_temperatures",
    "search_exits",
    "serve_app",
    "train",
    "unlabelled",
    "verdict",
]
