"""The versions that are declared, those that are tested, and what the page says of both are the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT


def _declared() -> list[Requirement]:
    """All that pyproject.toml requires, extras included."""
    tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [one for one in map(Requirement, lines) if one.name != project["name"]]


def _pinned(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_lowest_constraints_are_the_bounds_of_pyproject() -> None:
    bounds = {
        canonicalize_name(one.name): bound.version
        for one in _declared()
        for bound in one.specifier
        if bound.operator == ">="
    }
    assert _pinned("lowest.txt") == bounds


def test_every_dependency_has_a_bound_or_a_pin() -> None:
    assert not [one.name for one in _declared() if {bound.operator for bound in one.specifier} not in ({">="}, {"=="})]


def test_the_known_set_has_every_dependency_within_its_bounds() -> None:
    known = _pinned("known-good.txt")
    assert not [one.name for one in _declared() if not one.specifier.contains(known[canonicalize_name(one.name)])]


def test_the_page_tells_the_versions_of_both_sets() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z][\w-]*) \| (\S+ \| \S+) \|$", page, re.MULTILINE))
    lowest, known = _pinned("lowest.txt"), _pinned("known-good.txt")
    assert rows == {name: f"{bound} | {known[name]}" for name, bound in lowest.items()}


def test_the_citation_names_the_version_and_license_of_the_package() -> None:
    tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(re.findall(r'^(\S+): "?(.*?)"?$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert "- name: The ee_surgery developers" in (ROOT / "CITATION.cff").read_text()
