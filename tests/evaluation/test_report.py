"""The report is one file that a browser shows offline, and its slider works."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ee_surgery as ee
from tests.zoo import BY_NAME, branched

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def model() -> ee.EarlyExitModel:
    """Calibrated on noise, so that it has a frontier; its branches are untrained."""
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(64)
    ee.calibrate(model, [x])
    model.operate(budget=0.9)
    return model


def samples(n: int = 64) -> list[torch.Tensor]:
    return [BY_NAME["cifar-resnet20"].sample(n)]


def test_it_holds_all_it_shows(model: ee.EarlyExitModel, tmp_path: Path) -> None:
    bench = ee.bench(model, samples(4)[0], batch_sizes=[1], rounds=1, warmup=0)
    path = ee.report(model, tmp_path / "report.html", samples(), bench=bench)
    page = path.read_text()
    assert path.stat().st_size < 3e6
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    for heading in ("Exits", "Frontier", "Latency", "On 64 samples", "Who leaves where", "Classes", "Reliability"):
        assert f">{heading}</h2>" in page, heading
    points = json.loads(re.search(r"const points = (.*);", page)[1])  # pyright: ignore[reportOptionalSubscript]
    assert model.frontier is not None
    assert {point["macs"] for point in points} <= {point.macs_fraction for point in model.frontier}
    assert all(f'id="point-{i}"' in page for i in range(len(points)))


def test_without_data_and_frontier_it_says_what_is_missing(tmp_path: Path) -> None:
    case = BY_NAME["cifar-resnet20"]
    made = ee.augment(case.make(), ["layer1"], sample=case.sample(2))
    page = ee.report(made, tmp_path / "report.html").read_text()
    assert "Untrained, and of no use" in page
    assert "calibrate first" in page
    assert "No operating point is set" in page
    assert "<script>" not in page


def test_names_of_strangers_are_text(model: ee.EarlyExitModel, tmp_path: Path) -> None:
    other = model.copy()
    bad = "</script><script>alert(1)</script>"
    other.provenance["training"] = {"objective": bad, "losses": [2.0, "x"], bad: 1}
    other.provenance["effort"] = {"cost_after_each_look": [bad, bad]}
    page = ee.report(other, tmp_path / "report.html", samples(8), class_names=[bad] * 10).read_text()
    assert "<script>alert" not in page
    assert page.count("<script>") == 1


def test_an_iterator_is_refused(model: ee.EarlyExitModel, tmp_path: Path) -> None:
    with pytest.raises(ee.DataError, match="read only once"):
        ee.report(model, tmp_path / "report.html", iter(samples()))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in the PATH")
def test_the_slider_moves_the_mark(model: ee.EarlyExitModel, tmp_path: Path) -> None:
    path = ee.report(model, tmp_path / "report.html")
    moved = """<script>
    knob.value = 0; knob.dispatchEvent(new Event("input"));
    const shown = [...document.querySelectorAll("[id^=point-]")].filter(mark => mark.style.display !== "none");
    document.title = JSON.stringify([shown.map(mark => mark.id), document.getElementById("said").textContent]);
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", moved))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    marks, said = json.loads(re.search("<title>(.*)</title>", page)[1])  # pyright: ignore[reportOptionalSubscript]
    assert marks == ["point-0"]
    assert model.frontier is not None
    assert f"{100 * model.frontier[0].macs_fraction:.1f} % of the MACs" in said
