"""Tables of made-up results, to the letter."""

import cv2
import numpy as np
import pytest
from scipy import stats

from d2_deform.analysis.ablation import Metric, Row, Study
from d2_deform.analysis.ablation_report import (
    Estimate,
    compare_rows,
    draw_comparison,
    format_csv,
    format_markdown,
    format_runs_csv,
)

METRICS = (Metric("AP50", "bbox/AP50", 0), Metric("AP", "bbox/AP"))
STUDY = Study("rfcn", "digits", "quickstart.yaml", METRICS, "VOC 2007 test", 4)
ROWS = [
    Row("plain", "plain, dilation 4", {}, (80.0, None)),
    Row("dconv3", "3 deformable layers", {}, (81.4, None)),
    Row("dil2", "dilation 2", {}),
]
RESULTS = {
    "plain": {
        1: {"bbox/AP50": 60.0, "bbox/AP": 40.0},
        2: {"bbox/AP50": 62.0, "bbox/AP": 41.0},
        3: {"bbox/AP50": 64.0, "bbox/AP": 45.0},
    },
    "dconv3": {
        3: {"bbox/AP50": 66.0, "bbox/AP": 46.0},
        1: {"bbox/AP50": 63.0, "bbox/AP": 42.5},
        2: {"bbox/AP50": 63.0, "bbox/AP": 41.0},
        4: {"bbox/AP50": 70.0, "bbox/AP": 50.0},  # the plain network has not run with this seed
    },
    "of_another_table": {1: {"bbox/AP50": 1.0, "bbox/AP": 1.0}},
}


def test_estimate():
    assert Estimate.of([]) is None
    assert Estimate.of([3.0]) == Estimate(3.0, 1, None, None)
    two = Estimate.of([1.0, 3.0])
    assert (two.mean, two.count, two.margin) == (2.0, 2, None)
    assert two.spread == pytest.approx(np.sqrt(2))
    values = [60.0, 62.5, 61.0, 66.0]
    four = Estimate.of(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (four.mean - four.margin, four.mean + four.margin) == pytest.approx((low, high))
    # By a table: 4.303 with two degrees of freedom
    assert Estimate.of([60.0, 62.0, 64.0]).margin == pytest.approx(4.303 * 2 / np.sqrt(3), rel=1e-3)


def test_gains_are_of_pairs_with_the_same_seed():
    plain, deformable, missing = compare_rows(ROWS, METRICS, RESULTS)[:3]
    assert plain.gains == {} and plain.gain is None and plain.paper_gain is None
    assert deformable.values == {1: 63.0, 2: 63.0, 3: 66.0, 4: 70.0}
    assert deformable.gains == {1: 3.0, 2: 1.0, 3: 2.0}
    assert deformable.gain.mean == 2.0 and deformable.gain.spread == 1.0
    assert (deformable.paper, deformable.paper_gain) == (81.4, 1.4)
    assert missing.values == {} and missing.value is None and missing.paper is None


def test_markdown():
    text = format_markdown(STUDY, 1, compare_rows(ROWS, METRICS, RESULTS))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    start = lines.index("## AP50")
    assert lines[0] == "# Table 1: rfcn on digits"
    assert lines[start + 2] == (
        "| row | runs | AP50 | 95 % | gain | 95 % | paper (VOC 2007 test) | its gain |"
    )
    assert lines[start + 4 : start + 7] == [
        "| plain, dilation 4 | 3 | 62.00 ± 2.00 | 57.03 to 66.97 | | | 80.0 | |",
        "| 3 deformable layers | 4 | 65.50 ± 3.32 | 60.22 to 70.78 | +2.00 ± 1.00 "
        "| -0.48 to +4.48 | 81.4 | +1.4 |",
        "| dilation 2 | 0 | | | | | | |",
    ]
    start = lines.index("## AP")
    assert lines[start + 2] == "| row | runs | AP | 95 % | gain | 95 % |"  # no figures of the paper
    assert lines[start + 4] == "| plain, dilation 4 | 3 | 42.00 ± 2.65 | 35.43 to 48.57 | | |"


def test_csv():
    lines = format_csv(compare_rows(ROWS, METRICS, RESULTS)).splitlines()
    assert lines[0] == (
        "row,title,metric,runs,mean,spread,margin_95,gain_runs,gain_mean,gain_spread,"
        "gain_margin_95,paper,paper_gain"
    )
    assert lines[1].startswith('plain,"plain, dilation 4",AP50,3,62.0,2.0,4.968')
    assert lines[1].endswith(",0,,,,80.0,")
    assert lines[2].startswith("dconv3,3 deformable layers,AP50,4,65.5,3.31")
    assert ",3,2.0,1.0,2.484" in lines[2] and lines[2].endswith(",81.4,1.4")
    assert lines[3] == "dil2,dilation 2,AP50,0,,,,0,,,,,"
    assert len(lines) == 1 + len(ROWS) * len(METRICS)


def test_csv_of_every_run():
    runs = [
        {"row": "plain", "seed": 2, "figures": {"bbox/AP50": 62.0, "bbox/AP": 41.0}, "starts": 1},
        {"row": "plain", "seed": 1, "figures": {"bbox/AP50": 60.0, "bbox/AP": 40.0}, "starts": 2},
        {"row": "dil2", "seed": 7, "figures": {"bbox/AP50": 1.5}},
    ]
    assert format_runs_csv(runs).splitlines() == [
        "row,seed,starts,bbox/AP,bbox/AP50",
        "dil2,7,,,1.5",
        "plain,1,2,40.0,60.0",
        "plain,2,1,41.0,62.0",
    ]
    assert format_runs_csv([]) == "\n"


@pytest.mark.parametrize("results", [RESULTS, {}], ids=["results", "nothing yet"])
def test_picture(results):
    png = draw_comparison("Table 1", compare_rows(ROWS, METRICS, results), "VOC 2007 test")
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[1] == 1320 and 300 < picture.shape[0] < 1000
    blue, green, red = np.moveaxis(picture.astype(int), 2, 0)
    drawn = ((blue > 200) & (red < 60) & (green < 120)).sum()  # means and intervals
    in_legend = ((blue > 200) & (red < 60) & (green < 120))[-60:].sum()
    assert (drawn - in_legend > 500) == bool(results)
    assert (
        (red > 180) & (blue < 60) & (green < 90)
    ).sum() > 20  # the paper's gains, in either case
