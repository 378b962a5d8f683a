"""tools/prepare_voc_aug.py from the command line."""

import os
import subprocess
import sys

import numpy as np
from conftest import REPOSITORY
from PIL import Image


def test_counts(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, image_id in (("train", "2007_000032"), ("val", "2007_000033")):
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(image_id + "\n")
        labels = Image.fromarray(np.eye(8, dtype=np.uint8))
        labels.save(tmp_path / "SegmentationClass" / f"{image_id}.png")
    monkeypatch.setattr(sys, "argv", ["prepare_voc_aug.py", "--voc", str(tmp_path)])
    tool("prepare_voc_aug").main()
    assert capsys.readouterr().out.splitlines() == [
        f"Made 2 label maps in {tmp_path}/SegmentationClassAug",
        "train: 1 pictures (the complete data set: 1464)",
        "val: 1 pictures (the complete data set: 1449)",
    ]


def test_a_missing_folder_gets_one_line(tmp_path):
    script = os.path.join(REPOSITORY, "tools", "prepare_voc_aug.py")
    done = subprocess.run(
        [sys.executable, script, "--voc", str(tmp_path / "VOC2012")],
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "train.txt is missing" in done.stderr and "Traceback" not in done.stderr
