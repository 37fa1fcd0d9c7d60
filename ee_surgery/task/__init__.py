"""What an answer is: how sure it is, whether it is right, what its labels and its loss are. All others ask here."""

from ee_surgery.task.base import IGNORED, TASKS, Task, TaskNames, as_task, fits, require
from ee_surgery.task.classification import CLASSIFICATION, PROBABILITIES, Classification
from ee_surgery.task.multi_label import MultiLabel, mean_average_precision
from ee_surgery.task.segmentation import SEGMENTATION, Segmentation, SegmentationIoU

__all__ = [
    "CLASSIFICATION", "IGNORED", "PROBABILITIES", "SEGMENTATION", "TASKS", "Classification", "MultiLabel",
    "Segmentation", "SegmentationIoU", "Task", "TaskNames", "as_task", "fits", "mean_average_precision", "require",
]  # fmt: skip
