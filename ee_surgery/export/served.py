"""The part of EarlyExitModel that hands it to other engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ee_surgery.data.batches import Data
from ee_surgery.data.labels import ClassMap
from ee_surgery.export.onnx_file import Layout, export
from ee_surgery.names import Precision
from ee_surgery.runtime.compilation import Compilation
from ee_surgery.share.save_load import SharedModel


class ServedModel(SharedModel):
    """Compiling and exporting."""

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, freeze: bool = False, pad: bool | None = None, disable: bool = False, **options: Any
    ) -> None:
        """Compile routed runs, in place, on first use: each stage with its branch and score; see `Compilation`.

        Args:
            freeze: pack copies of all weights; taken again when the weights change.
            pad: pad samples in flight to the next power of two; by default with CUDA graphs alone.
            disable: run without torch.compile again.
            options: of torch.compile: `backend`, `mode`, `options`.
        Raises:
            ConfigError: torch.compile does not take them.
        """
        compilation = Compilation(options, freeze, pad)
        self.engine.compilation = None if disable else compilation

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        layout: Layout = "file",
        check: bool = True,
        quantize: Precision | None = None,
        calibrate: Data | None = None,
        class_map: ClassMap | None = None,
    ) -> Path:
        """Write ONNX in which each sample leaves on its own; arguments as of `ee_surgery.export.onnx_file.export`."""
        how: dict[str, Any] = {"quantize": quantize, "calibrate": calibrate, "class_map": class_map}
        return export(self.engine, self.state, path, layout=layout, check=check, **how)
