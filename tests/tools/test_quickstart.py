"""tools/quickstart.py, a few iterations of it."""

import json
import os

import cv2
import pytest


def test_leaves_summary_and_picture(tool, tiny, tmp_path, capsys):
    summary = tool("quickstart").main(["--output", str(tmp_path), "--iterations", "3", *tiny])
    with open(tmp_path / "summary.json") as file:
        assert json.load(file) == summary
    assert {"AP", "AP50", "iterations", "train_seconds", "picture", "weights", "config"} <= set(
        summary
    )
    assert summary["iterations"] == 3 and 0 <= summary["AP50"] <= 100
    for key in ("picture", "weights", "config", "log"):
        assert os.path.isfile(summary[key]) and os.path.isabs(summary[key])
    assert cv2.imread(summary["picture"]).shape[0] > 480
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    last_lines = capsys.readouterr().out.splitlines()[-6:]
    assert last_lines[0].startswith("==> Done: AP50 ")
    assert last_lines[1].split() == ["Summary:", str(tmp_path / "summary.json")]


def test_no_summary_of_a_run_that_failed(tool, tiny, tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    quickstart = tool("quickstart")
    monkeypatch.setattr(quickstart, "train", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quickstart.main(["--output", str(tmp_path), *tiny])
    assert not (tmp_path / "summary.json").exists()
