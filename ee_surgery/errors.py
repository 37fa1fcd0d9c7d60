"""All errors of this package. Each says what was wrong, what was seen and what to do.

Messages quote names from adapters, repositories and models, and are shown in terminals and logs: printed, they contain
no control characters and have bounded length. `args` keeps them unchanged.
"""

import torch

from ee_surgery.text import paragraph

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Out of memory says nothing about the model or data: these errors are always re-raised unchanged."""


class SurgeryError(Exception):
    """Base of all errors of ee_surgery."""

    def __str__(self) -> str:
        return paragraph(super().__str__())


class SurgeryWarning(UserWarning):
    """Warnings of ee_surgery, displayed like its errors."""

    def __str__(self) -> str:
        return paragraph(super().__str__())


class CaptureError(SurgeryError, RuntimeError):
    """A model could not be read as a graph with a symbolic batch."""


class ExitPointError(SurgeryError, ValueError):
    """There is no such exit point, or samples cannot leave there."""


class BranchError(SurgeryError, ValueError):
    """A branch does not fit the features of its exit."""


class ConfigError(SurgeryError, ValueError):
    """A setting is outside its range or contradicts another."""


class DataError(SurgeryError, ValueError):
    """The data cannot be used as it is."""


class OperatingPointError(SurgeryError, ValueError):
    """No operating point meets the request, or there is no frontier yet."""


class TrainingError(SurgeryError, RuntimeError):
    """Training cannot continue."""


class AdapterError(SurgeryError, ValueError):
    """An adapter folder is damaged, incomplete or of a different format."""


class FingerprintError(AdapterError):
    """The backbone is not the one that the adapter's branches were trained on."""


class HubError(SurgeryError, OSError):
    """The Hub refused, cannot be reached, or has no such repository."""


class WriteError(SurgeryError, OSError):
    """A file could not be written: no space, no permission, a failing disk."""


class ServingError(SurgeryError, RuntimeError):
    """An engine cannot answer a request: it is closed, say."""


class QueueFullError(ServingError):
    """An engine has as many samples waiting as it takes: try again later, or slow down."""


class RequestTimeoutError(ServingError, TimeoutError):
    """A request was not answered within its time."""


class UnknownNameError(SurgeryError, KeyError):
    """A registry has nothing under that name."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return paragraph(self.args[0]) if self.args else ""
