"""Trackers: where training metrics are logged besides the screen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from ee_surgery.files import write_error


class JsonLines(GeneralTracker):
    """A file with one JSON object per line: the settings, then the metrics of each epoch. Needs no other package.

    Use: `Accelerator(log_with=[JsonLines("runs/log.jsonl"), "tensorboard"], project_dir="runs")`.

    Args:
        path: appended to if it exists, so that a resumed training continues the same file.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write the settings.

        Raises:
            WriteError: the file cannot be written.
        """
        self._write({"settings": values})

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write metrics; `step` is the epoch, counted from 1.

        Raises:
            WriteError: the file cannot be written.
        """
        self._write({"epoch": step, **values})

    def _write(self, values: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, (json.dumps(values) + "\n").encode())
        except OSError as error:
            raise write_error(self.path, error, "Earlier lines are intact.") from error


def _append(path: Path, line: bytes) -> None:
    """Append a whole line to a file, or nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except BaseException:
            file.truncate(end)
            raise
