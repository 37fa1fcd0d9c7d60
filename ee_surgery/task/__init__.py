"""What an answer is: how sure it is, whether it is right, what its labels and its loss are. All others ask here."""

from ee_surgery.task.base import CHOICES, IGNORED, TASKS, Task, TaskNames, as_task, fits, require, stored_task
from ee_surgery.task.classification import CLASSIFICATION, PROBABILITIES, Classification
from ee_surgery.task.embedding import Embedding, Gallery
from ee_surgery.task.multi_label import MultiLabel, mean_average_precision
from ee_surgery.task.regression import MapRegression, Regression
from ee_surgery.task.segmentation import SEGMENTATION, Segmentation, SegmentationIoU

__all__ = [
    "CHOICES", "CLASSIFICATION", "IGNORED", "PROBABILITIES", "SEGMENTATION", "TASKS", "Classification", "Embedding",
    "Gallery", "MapRegression", "MultiLabel", "Regression", "Segmentation", "SegmentationIoU", "Task", "TaskNames",
    "as_task", "fits", "mean_average_precision", "require", "stored_task",
]  # fmt: skip
