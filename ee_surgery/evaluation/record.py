"""Record the logits of every exit on held-out data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import instance
from ee_surgery.data.batches import Data
from ee_surgery.data.distributed import Processes
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.data.recording import ask_engine, recorded
from ee_surgery.model import EarlyExitModel

if TYPE_CHECKING:
    from accelerate import Accelerator


def record(
    branched: EarlyExitModel,
    data: Data,
    *,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> ExitRecords:
    """Run every exit on every sample, without exiting, and record the outputs.

    With an accelerator, its processes share the work: call it in all of them. Each ends with all records, in the order
    of the data. Without one, this process does all of it.

    Args:
        data: held out: neither what trained the branches nor what will be reported. Without labels, the
            original's own answers stand for them. Samples labelled -100 are left out; of class probabilities, the most
            probable class is the label.
        class_map: which class of the model each label of the data is, where they are not the same: a list or dict of
            class numbers, names or WordNet ids.
    Raises:
        DataError: no samples, labels for some batches only, labels that are no classes of the model, or that the
            original clearly knows nothing about (see `strangers`).
    """
    engine = instance("branched", branched, EarlyExitModel).engine
    working, known = processes(branched, accelerator), Labels(engine, class_map)
    return recorded(engine, data, known, ask_engine(engine), batch_size=batch_size, working=working)


def processes(branched: EarlyExitModel, accelerator: Accelerator | None) -> Processes:
    """The processes of an accelerator; moves the model to this process's device."""
    if accelerator is not None:
        from accelerate import Accelerator

        instance("accelerator", accelerator, Accelerator)
        branched.to(accelerator.device)
    return Processes(accelerator)
