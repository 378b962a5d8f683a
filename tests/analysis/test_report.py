"""Tables and lines from counts."""

import json

import pytest

from d2_deform.analysis import Report, compare_reports


@pytest.fixture
def plain():
    by_part = {
        "parameter": {"rest": 0, "backbone.res5": 3_000_000, "head": 1_000_000},
        "runtime": {"rest": 0.001, "backbone.res5": 0.050, "head": 0.049},
    }
    return Report("plain", by_part, num_proposals=300)


@pytest.fixture
def deformable():
    by_part = {
        "parameter": {"backbone.res5": 3_000_000, "backbone.res5.offsets": 248_886, "head": 1e6}
    }
    return Report("dconv", by_part, num_proposals=280)


def cells(table):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_table(plain):
    header, _, *rows = cells(plain.table())
    assert header == ["part", "parameters (M)", "share", "forward time (ms)", "share"]
    assert rows == [
        ["rest", "0", "", "1.0", "1.0 %"],
        ["backbone.res5", "3.000", "75.0 %", "50.0", "50.0 %"],
        ["head", "1.000", "25.0 %", "49.0", "49.0 %"],
        ["total", "4.000", "", "100.0", ""],
    ]


def test_summary(plain):
    assert plain.summary() == "plain: 4.000 M parameters, 100.0 ms forward time, 300 proposals"


def test_as_dict_is_json(plain):
    read = json.loads(json.dumps(plain.as_dict()))
    assert read["total"] == {"parameter": 4_000_000, "runtime": pytest.approx(0.1)}
    assert read["by_part"]["parameter"]["head"] == 1_000_000
    assert (read["name"], read["num_proposals"]) == ("plain", 300)


def test_comparison(plain, deformable):
    """Only the task that both have, only parts that have anything, the new part in its place."""
    table, line = compare_reports(plain, deformable)
    header, _, *rows = cells(table)
    assert header == ["parameters (M)", "plain", "share", "dconv", "share", "difference"]
    assert rows == [
        ["backbone.res5", "3.000", "75.0 %", "3.000", "70.6 %", "0"],
        ["backbone.res5.offsets", "0", "", "0.249", "5.9 %", "+0.249"],
        ["head", "1.000", "25.0 %", "1.000", "23.5 %", "0"],
        ["total", "4.000", "", "4.249", "", "+0.249"],
    ]
    assert line == "dconv against plain: +0.249 M parameters (+6.2 %); 280 and 300 proposals"
