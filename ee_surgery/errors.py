"""Every error this package raises on purpose. Each says what was wrong, what was seen and what to do.

Messages quote names out of adapters, repositories and models of other people, and end in terminals and logs: printed,
they hold no control characters and are of bounded length. `args` keeps them as they were.
"""

import torch

from ee_surgery.text import paragraph

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Says nothing about the model or the data at hand: never taken for an answer, always passed on as it is."""


class SurgeryError(Exception):
    """Base of all errors of ee_surgery."""

    def __str__(self) -> str:
        return paragraph(super().__str__())


class SurgeryWarning(UserWarning):
    """What ee_surgery warns of; printed as its errors are."""

    def __str__(self) -> str:
        return paragraph(super().__str__())


class CaptureError(SurgeryError, RuntimeError):
    """A model could not be read as a graph with a symbolic batch."""


class ExitPointError(SurgeryError, ValueError):
    """An exit was asked for where there is none, or where a sample cannot leave."""


class BranchError(SurgeryError, ValueError):
    """A branch does not fit the features of its exit."""


class ConfigError(SurgeryError, ValueError):
    """A setting is outside its range or contradicts another."""


class DataError(SurgeryError, ValueError):
    """Data that was handed in cannot be used as it is."""


class OperatingPointError(SurgeryError, ValueError):
    """No operating point meets the request, or none has been searched yet."""


class TrainingError(SurgeryError, RuntimeError):
    """Training cannot go on."""


class AdapterError(SurgeryError, ValueError):
    """An adapter folder is damaged, incomplete or of another format."""


class FingerprintError(AdapterError):
    """An adapter was offered a backbone other than the one its branches were trained on."""


class HubError(SurgeryError, OSError):
    """The Hub refused, is out of reach, or has no such repository."""


class WriteError(SurgeryError, OSError):
    """A file could not be written: no space, no permission, a failing disk."""


class UnknownNameError(SurgeryError, KeyError):
    """A registry holds nothing under that name."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return paragraph(self.args[0]) if self.args else ""
