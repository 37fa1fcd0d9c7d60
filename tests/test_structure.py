"""The house rules: imports point one way, names are documented, nothing public is missing."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ee_surgery as ee
from tests import ROOT

PACKAGE = Path(ee.__file__).parent
# The data flow, top to bottom; a file imports only from its own room and those above.
ROOMS = [
    "names", "text", "errors", "registry", "checks", "files", "tables", "receipt", "task",
    "backbone", "graph", "placement", "branches", "policies", "calibration", "runtime", "share", "data", "onnx",
    "export", "model", "attachment", "training", "evaluation", "monitoring", "search",
    "presets", "pipeline", "integrations", "serving", "folders", "project", "demo", "cli",
]  # fmt: skip


FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(root: Path, package: str) -> dict[str, set[str]]:
    """Of each module, the modules of the same package that it imports anywhere, lazily and for types alone included."""
    modules = {path: ".".join((package, *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("*.py")}
    modules = {path: name.removesuffix(".__init__") for path, name in modules.items()}
    known, found = set(modules.values()), {}
    for path, name in modules.items():
        edges: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                edges.update(one if one in known else node.module for one in inner)
        found[name] = {edge for edge in edges if edge in known and edge != package} - {name}
    return found


def _circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    order = TopologicalSorter(imports)
    try:
        order.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_up_the_list() -> None:
    rank = {room: number for number, room in enumerate(ROOMS)}
    for name, edges in _imports(PACKAGE, "ee_surgery").items():
        for edge in edges if name != "ee_surgery" else ():
            assert rank[edge.split(".")[1]] <= rank[name.split(".")[1]], f"{name} imports {edge}"


@pytest.mark.parametrize("package", ["ee_surgery", "benchmarks", "recipes"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    imports = _imports(ROOT / package, package)
    imports.pop(package)
    # a room's __init__ gathers its own files, which name each other and not the room
    assert not _circle({name: edges - {name.rpartition(".")[0]} for name, edges in imports.items()})


def test_every_room_is_in_the_list() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("name", ee.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(ee, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert (thing.__doc__ or "").strip()
    if inspect.isclass(thing) and thing.__module__.startswith("ee_surgery"):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and inspect.isfunction(value):
                assert (value.__doc__ or "").strip(), f"{name}.{attribute}"


def test_choices_are_read_off_the_literals_that_say_them() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            known = (
                [*node.args[2:3], *(k.value for k in node.keywords if k.arg == "known")]
                if isinstance(node, ast.Call)
                else []
            )
            if known and re.search(r"\bchoice\b", ast.unparse(node)):
                assert not isinstance(known[0], (ast.Tuple, ast.List, ast.Set)), f"{path}:{node.lineno}: use get_args"


HEAVY = ("torch", "numpy", "scipy", "torchvision", "timm", "transformers", "datasets", "matplotlib", "accelerate",
         "pydantic", "typer", "jinja2", "IPython", "pandas", "sklearn")  # fmt: skip


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, ee_surgery; print(*[name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_warned_of_is_shown_as_errors_are(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            assert "SurgeryWarning" in map(ast.unparse, node.args), f"{path}:{node.lineno}"


def test_the_names_that_help_shows_are_those_that_are_registered() -> None:
    from ee_surgery import names
    from ee_surgery.evaluation.engines import ENGINES

    known = {"BRANCHES": ee.BRANCHES, "CALIBRATORS": ee.CALIBRATORS, "ENGINES": ENGINES}
    for name, registered in {**known, "PLACEMENTS": ee.PLACEMENTS, "PRESETS": ee.PRESETS}.items():
        assert getattr(names, name) == tuple(registered)


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys, ee_surgery.cli; print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
