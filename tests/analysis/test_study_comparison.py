"""Made-up studies beside each other, to the letter."""

import cv2
import numpy as np
import pytest

from d2_deform.analysis.ablation import Metric
from d2_deform.analysis.study_comparison import (
    compare_studies,
    draw_studies,
    find_missing_runs,
    format_studies_csv,
    format_studies_markdown,
)

METRICS = [Metric("AP50", "bbox/AP50", 0), Metric("AP", "bbox/AP")]
ROWS = ["plain", "dconv3"]


def results(plain, dconv3):
    """AP50 by seed, AP half of it."""
    return {
        row: {seed: {"bbox/AP50": v, "bbox/AP": v / 2} for seed, v in figures.items()}
        for row, figures in (("plain", plain), ("dconv3", dconv3))
    }


STUDIES = {
    "straight": results({1: 60.0, 2: 62.0, 3: 64.0}, {1: 61.0, 2: 62.0, 3: 63.0}),
    "bent": results({1: 50.0, 2: 52.0, 3: 51.0, 4: 50.0}, {2: 54.0, 1: 52.0, 3: 53.0}),
}


@pytest.fixture(scope="module")
def lines():
    return compare_studies(STUDIES, ROWS, METRICS)


def test_gains_are_within_a_study_and_growth_between_them(lines):
    found = [(line.comparison.metric.name, line.comparison.row.name, line.study) for line in lines]
    assert found == [
        (metric.name, row, study) for metric in METRICS for row in ROWS for study in STUDIES
    ]
    plain, bent_plain, straight, bent = lines[:4]
    assert plain.comparison.gains == bent_plain.comparison.gains == {}
    assert plain.growth == bent_plain.growth == straight.growth == {}
    assert straight.comparison.gains == {1: 1.0, 2: 0.0, 3: -1.0}
    assert bent.comparison.gains == {1: 2.0, 2: 2.0, 3: 2.0}
    assert bent.growth == {1: 1.0, 2: 2.0, 3: 3.0}
    assert lines[-1].growth == {1: 0.5, 2: 1.0, 3: 1.5}


def test_runs_that_are_missing():
    assert find_missing_runs(STUDIES, ROWS) == [
        "straight: plain has no finished run of seed 4.",
        "straight: dconv3 has no finished run of seed 4.",
        "bent: dconv3 has no finished run of seed 4.",
    ]
    assert find_missing_runs({"a": {"plain": {}}, "b": {"plain": {1: {}, 2: {}}}}, ["plain"]) == [
        "a: plain has no finished run of seed 1, 2."
    ]
    assert find_missing_runs({"straight": STUDIES["straight"]}, ROWS) == []


def test_markdown(lines):
    text = format_studies_markdown("rfcn on a, b", lines, ["One is missing."])
    found = [" ".join(line.split()) for line in text.splitlines()]
    assert found[0] == "# rfcn on a, b" and found[-1] == "One is missing."
    start = found.index("## AP50")
    assert found[start + 2] == (
        "| row | study | runs | AP50 | 95 % | gain | 95 % | growth | 95 % |"
    )
    assert found[start + 5 : start + 8] == [
        "| plain | bent | 4 | 50.75 ± 0.96 | 49.23 to 52.27 | | | | |",
        "| dconv3 | straight | 3 | 62.00 ± 1.00 | 59.52 to 64.48 | +0.00 ± 1.00 "
        "| -2.48 to +2.48 | | |",
        "| dconv3 | bent | 3 | 53.00 ± 1.00 | 50.52 to 55.48 | +2.00 ± 0.00 | +2.00 to +2.00 "
        "| +2.00 ± 1.00 | -0.48 to +4.48 |",
    ]
    assert "the gain minus that in straight with the same seed" in text


def test_csv(lines):
    found = format_studies_csv(lines).splitlines()
    assert found[0] == (
        "study,row,metric,runs,mean,spread,margin_95,gain_runs,gain_mean,gain_spread,"
        "gain_margin_95,growth_runs,growth_mean,growth_spread,growth_margin_95"
    )
    assert found[1].startswith("straight,plain,AP50,3,62.0,2.0,4.968")
    assert found[1].endswith(",0,,,,0,,,")
    assert found[4].startswith("bent,dconv3,AP50,3,53.0,1.0,2.484")
    assert ",3,2.0,0.0,0.0,3,2.0,1.0,2.484" in found[4]
    assert len(found) == 1 + len(lines)


def test_picture(lines):
    picture = cv2.imdecode(
        np.frombuffer(draw_studies("rfcn", lines), np.uint8), cv2.IMREAD_COLOR
    ).astype(int)
    assert picture.shape[1] == 1320
    blue, green, red = np.moveaxis(picture, 2, 0)
    intervals = (blue > 200) & (red < 60) & (green < 120)
    middle = picture.shape[1] // 2
    assert intervals[:, :middle].sum() > 500 and intervals[:, middle:].sum() > 200
    assert not ((red > 180) & (blue < 60) & (green < 90)).any()  # no figures of the paper
