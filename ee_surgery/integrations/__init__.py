"""At home in other libraries: registered with them as soon as they are imported, and never the reason that they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ee_surgery.errors import SurgeryWarning
from ee_surgery.integrations.metrics import exit_metrics

__all__ = ["exit_metrics", "register"]


def register() -> None:
    """Make the Auto classes of transformers know adapters: now where it is imported, else right after it is.

    A plain torch or timm model should not pay for its import. Calling this again changes nothing.
    """
    if "transformers" in sys.modules:
        from ee_surgery.integrations.transformers import register as register_classes

        register_classes()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Finds transformers where everybody else does, and registers once it has been imported."""

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

        # Only now: many libraries ask for the spec without importing, to know whether it is installed.
        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                register()
            except Exception as error:  # transformers itself must not fail for it
                warnings.warn(
                    f"ee_surgery's classes are not known to transformers: {error}", SurgeryWarning, stacklevel=2
                )

        spec.loader.exec_module = run_and_register
        return spec
