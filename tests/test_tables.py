import csv
from pathlib import Path

import pandas as pd
import pytest

import ee_surgery as ee
from ee_surgery.tables import html, table
from tests.strategies import synthetic


@pytest.fixture
def records() -> ee.ExitRecords:
    return synthetic(60, 3)


def test_records_give_a_row_per_sample_and_exit(records: ee.ExitRecords) -> None:
    frame = records.to_pandas()
    assert len(frame) == len(records) * (len(records.exits) + 1)
    means = frame.groupby("exit", sort=False)["outcome"].mean()
    assert means.tolist() == pytest.approx(records.accuracies)
    last = frame[frame.exit == "original"]
    assert (last.agreement == 1).all()
    assert (last.macs_fraction == 1).all()
    assert ((frame.answer == frame.label) == (frame.outcome == 1)).all()


def test_a_frontier_survives_csv(records: ee.ExitRecords, tmp_path: Path) -> None:
    frontier = ee.Frontier.search(records)
    frontier.to_csv(tmp_path / "frontier.csv")
    read = pd.read_csv(tmp_path / "frontier.csv")
    pd.testing.assert_frame_equal(read, frontier.to_pandas(), check_dtype=False)
    assert read.macs_fraction.is_monotonic_increasing
    shares = [name for name in read.columns if name.startswith("share ")]
    assert read[shares].sum(axis=1).tolist() == pytest.approx([1.0] * len(read))


def test_csv_is_written_whole_or_not_at_all(tmp_path: Path, records: ee.ExitRecords) -> None:
    path = tmp_path / "missing" / "records.csv"
    records.to_csv(path)
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == len(records.rows())
    with pytest.raises(ee.WriteError):
        records.to_csv(path / "below-a-file.csv")


def test_html_shows_names_of_strangers_as_text() -> None:
    shown = html(table("<b>", "a & b", {"<script>": "left"}, [["<img src=x onerror=alert(1)>"]]))
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown


def test_notebooks_show_the_table_of_the_terminal(records: ee.ExitRecords) -> None:
    for thing in (records, ee.Frontier.search(records)):
        shown = thing._repr_html_()
        for column in thing.table().columns:
            assert f"<th>{column.header}</th>" in shown
