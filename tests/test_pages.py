"""The pages of the documentation as a browser shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pages

pytestmark = pytest.mark.skipif(pages.CHROMIUM is None, reason="needs Chromium in the PATH")

BODIES = {
    "good": "<table><tr><td>1</td></tr></table><pre>1</pre>",
    "scrolls": "<div style='overflow-x: auto'><table style='width: 3000px'><tr><td>1</td></tr></table></div>",
    "wide": "<p style='width: 3000px'>1</p>",
    "clipped": "<div style='overflow: hidden'><table style='width: 3000px'><tr><td>number</td></tr></table></div>",
    "code": "<pre style='overflow: hidden'>" + "long " * 900 + "</pre>",
    "phone": "<p style='width: 600px'>1</p>",
    "script": "<script>console.error('broken')</script>",
    "thrown": "<script>throw new Error('thrown')</script>",
    "missing": "<img src='nothing.png'>",
    "elsewhere": "<img src='https://elsewhere.invalid/nothing.png'>",
}


def test_what_does_not_fit_or_fails_is_found(tmp_path: Path) -> None:
    for name, body in BODIES.items():
        (tmp_path / name).mkdir()
        page = f"<!DOCTYPE html><html><head></head><body><article>{body}</article></body></html>"
        (tmp_path / name / "index.html").write_text(page)
    opened, found = pages.check(tmp_path)
    assert opened == 2 * len(BODIES)
    seen = {(problem.split()[0].strip("/"), problem.split()[1].strip("()")) for problem in found}
    both = ("wide", "clipped", "code", "script", "thrown", "missing")
    assert seen == {(name, screen) for name in both for screen in pages.WIDTHS} | {("phone", "phone")}


@pytest.mark.slow
def test_every_page_of_the_site_fits_on_a_desktop_and_a_phone(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pages.build(tmp_path / "site")
    opened, found = pages.check(tmp_path / "site")
    assert found == []
    assert opened == 2 * len(pages.pages(tmp_path / "site")) > 60
