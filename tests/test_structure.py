"""The house rules: imports point one way, names are documented, nothing public is missing."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import ee_surgery as ee

PACKAGE = Path(ee.__file__).parent
# The data flow, top to bottom; a file imports only from its own room and those above.
ROOMS = [
    "text", "errors", "registry", "checks", "files", "inputs", "picture_settings", "pictures", "samples", "answers",
    "wrappers", "refusals", "receipt", "twin", "signature", "backbone", "graph", "placement", "branches", "policies",
    "runtime", "share", "model", "attach", "training", "presets", "pipeline", "integrations", "report", "demo", "cli",
]  # fmt: skip


def _room(module: str) -> str:
    return module.removeprefix("ee_surgery.").split(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up_the_list(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    mine = ROOMS.index(_room(module))
    tree = ast.parse(path.read_text())
    for node in tree.body:  # imports at the top; a lazy one inside a function says why it is there
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ee_surgery."):
            assert ROOMS.index(_room(node.module or "")) <= mine, f"{path}: {node.module}"


@pytest.mark.parametrize("name", ee.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(ee, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert (thing.__doc__ or "").strip()
    if inspect.isclass(thing) and thing.__module__.startswith("ee_surgery"):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and inspect.isfunction(value):
                assert (value.__doc__ or "").strip(), f"{name}.{attribute}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_warned_of_is_shown_as_errors_are(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            assert "SurgeryWarning" in map(ast.unparse, node.args), f"{path}:{node.lineno}"
