"""benchmarks/: every script runs at tiny sizes, its JSON is complete, absent peers are told."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ["deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool"]
TIMED = ["forward", "backward", "threads", "growth"]


@pytest.fixture(autouse=True)
def repository_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_operator(name, folder, *parts):
    """The results of a script, quick, on one thread."""
    script = importlib.import_module(f"benchmarks.{name}")
    from benchmarks.common.script import operator_main

    options = ["--quick", "--threads", "1", "--output", str(folder), "--parts", *parts]
    operator_main(script.operator, script.__doc__, options)
    return json.loads((folder / f"{name}.json").read_text())


def check_head(data, name):
    assert data["benchmark"] == name
    assert data["machine"]["processor"] and data["machine"]["versions"]["torch"]
    assert data["settings"] == {"threads": 1, "rounds": 2, "quick": True}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_times(name, tmp_path, capsys):
    data = run_operator(name, tmp_path, *TIMED)
    check_head(data, name)
    assert list(data["parts"]) == TIMED
    for part in ("forward", "backward"):
        for row in data["parts"][part]["rows"]:
            if "case" in row["absent"]:
                continue
            assert row["description"] and row["figures"]["ours / torchvision"] > 0
            assert row["times"]["ours"]["minimum"] <= row["times"]["ours"]["median"]
            assert len(row["times"]["ours"]["runs"]) == 2
    threads = data["parts"]["threads"]["rows"]
    assert all(row["figures"]["bits equal"] == 1 for row in threads)
    assert all(row["figures"]["1 thread / 2 threads"] > 0 for row in threads)
    assert all("exponent" in row["figures"] for row in data["parts"]["growth"]["rows"])
    assert (tmp_path / f"{name}_times.png").exists()
    assert (tmp_path / f"{name}_growth.png").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{name}: goals not judged")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_operator_memory_is_added_to_what_was_measured(tmp_path):
    name = "deform_roi_pool"
    run_operator(name, tmp_path, "forward")
    data = run_operator(name, tmp_path, "memory")
    assert list(data["parts"]) == ["forward", "memory"]
    rows = data["parts"]["memory"]["rows"]
    assert {row["case"] for row in rows} >= {"batch x1, forward", "pixels x4, backward"}
    assert all(row["megabytes"]["ours"] < 8 for row in rows)
    assert (tmp_path / f"{name}_memory.png").exists()


TWICE = """
import torch
from benchmarks.common.problem import Case, Operator, Problem, Series

def build():
    x = torch.ones(2 * 10**6, requires_grad=True)
    return Problem([x], {"ours": lambda: x * 2 + 1})

def operator(quick):
    series = Series("size", {1: Case("", "", 0, build)})
    return Operator("twice", cases=[], threads=[], growth=[], memory=[series])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_counts_what_a_call_takes(tmp_path, monkeypatch):
    """Forward the product of 8 MB beside the sum; backward a gradient that is both."""
    from benchmarks.common.memory import measure_memory

    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    operator = importlib.import_module("twice").operator(quick=True)
    found = list(measure_memory(operator, operator.memory[0], threads=1, quick=True))
    measured = {row["pass"]: row["megabytes"] for row in found if row["peer"] == "ours"}
    assert measured["forward"] == pytest.approx(8, abs=1)
    assert measured["backward"] == pytest.approx(0, abs=1)


def test_absent_peers_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    data = run_operator("deform_conv2d", tmp_path, "forward")
    first = data["parts"]["forward"]["rows"][0]
    assert set(first["times"]) == {"ours", "dense"}
    assert set(first["absent"]) == {"torchvision", "onnxruntime"}
    out = capsys.readouterr().out
    assert "- torchvision: absent, torchvision is not installed" in out
    assert "- onnxruntime: absent, onnx" in out


@pytest.mark.parametrize("modulated", [False, True])
def test_peers_compute_the_same_convolution(modulated):
    from benchmarks.deform_conv2d import Convolution

    problem = Convolution("", 2, 8, 7, 9, dilation=2, deform_groups=2, modulated=modulated).build()
    expected = problem.calls["ours"]()
    compared = [name for name in ("torchvision", "onnxruntime") if name in problem.calls]
    for name in compared:
        torch.testing.assert_close(problem.calls[name](), expected, atol=1e-4, rtol=1e-4)
    if not compared:
        pytest.skip("no peer is installed")


def test_boxes_lie_inside_the_picture():
    from benchmarks.common.boxes import random_boxes

    index, x1, y1, x2, y2 = random_boxes(50, 3, height=608, width=1008).unbind(dim=1)
    assert index.unique(return_counts=True)[1].tolist() == [50, 50, 50]
    assert min(x1.min(), y1.min()) >= 0 and x2.max() <= 1008 and y2.max() <= 608
    assert min((x2 - x1).min(), (y2 - y1).min()) >= 20


def test_goals():
    from benchmarks.common.goals import judge, verdict

    figures = {"ours / dense": 1.3, "torchvision / ours": 5.0}
    row = {"case": "res5", "figures": figures, "absent": {"onnxruntime": "is not installed"}}
    judged = judge("deform_conv2d", "forward", row)
    assert [verdict(goal) for goal in judged] == [
        "1.3, NOT met",
        "not judged: is not installed",
        "5, met",
    ]
    assert judge("deform_conv2d", "growth", row) == []


def test_goals_are_told_by_their_farthest_case():
    from benchmarks.common.goals import judge
    from benchmarks.common.tables import goals_table, summary

    goals = []
    for case, ratio in (("1x1", 1.2), ("5x5", 1.7), ("batch 2", 1.4)):
        row = {"case": case, "figures": {"ours / dense": ratio, "torchvision / ours": 6.0}}
        goals += judge("deform_conv2d", "forward", row)
    assert summary(goals) == "1 of 2 goals met"
    assert goals_table(goals).splitlines()[2:] == [
        "| deform_conv2d, forward | ours / dense | <= 1.5 | 1.7 (5x5) | NOT met: 2 of 3 |",
        "| deform_conv2d, forward | torchvision / ours | >= 1 | 6 (1x1) | met: 3 of 3 |",
    ]


@pytest.mark.slow
def test_networks(tmp_path):
    pytest.importorskip("detectron2")
    from benchmarks import networks

    options = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    networks.main([*options, "--parts", "R-50"])
    networks.main([*options, "--profile"])
    data = json.loads((tmp_path / "networks.json").read_text())
    check_head(data, "networks")
    rows = data["parts"]["R-50"]["rows"]
    assert [row["case"] for row in rows] == ["inference", "training step"]
    assert all(row["figures"]["deformable / plain"] > 0 for row in rows)
    (row,) = data["parts"]["profile"]["rows"]
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert 0 < row["shares"]["our operators"] < 1
    assert len(row["top"]) == 15


def test_page_is_filled_between_its_markers(tmp_path):
    from benchmarks import run

    run_operator("deform_roi_pool", tmp_path, "forward")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{run.BEGIN}\nold\n{run.END}\nlast\n")
    run.fill_page(page, run.report(tmp_path, page.parent))
    text = page.read_text()
    assert text.startswith("# Page\n") and text.endswith(f"{run.END}\nlast\n")
    assert "old" not in text and "### deform_roi_pool: forward" in text
    assert "](deform_roi_pool_times.png)" in text
