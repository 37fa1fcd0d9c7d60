"""Integration with other libraries: registered when they are imported, without importing them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ee_surgery.integrations.metrics import exit_metrics

__all__ = ["exit_metrics", "register"]


def __getattr__(name: str) -> object:
    if name == "exit_metrics":  # imported on first use: it needs torch
        from ee_surgery.integrations.metrics import exit_metrics

        return exit_metrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Register adapters with the Auto classes of transformers: now if it is imported, else right after its import.

    Users of torch and timm models should not pay for importing transformers. Calling this again has no effect.
    """
    if "transformers" in sys.modules:
        from ee_surgery.integrations.transformers import register as register_classes

        register_classes()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Finds transformers through the other finders, and registers once it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next((s for finder in finders if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        # Not earlier: many libraries look up the spec only to see whether it is installed.
        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                register()
            except Exception as error:  # must not break the import of transformers
                from ee_surgery.errors import SurgeryWarning

                warnings.warn(
                    f"ee_surgery's classes are not registered with transformers: {error}", SurgeryWarning, stacklevel=2
                )

        spec.loader.exec_module = run_and_register
        return spec
