"""tools/run_ablation.py with real trainings of a few iterations, killed and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from d2_deform.engine import ConfigError

STUDY = ("--table", "1", "--method", "rfcn", "--data", "digits", "--seeds", "1")


def command(*words):
    script = os.path.join(REPOSITORY, "tools", "run_ablation.py")
    return [sys.executable, script, *map(str, words)]


def environment(**more):
    return {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", **more}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_stopped_and_taken_up_again(tool, tiny, tmp_path, capsys):
    folder = tmp_path / "study"
    options = [
        *("--rows", "plain", "dconv3", "--output", str(folder), "--num-gpus", "0"),
        *("--iterations", "6", *tiny, "SOLVER.CHECKPOINT_PERIOD", "1"),
    ]
    first = subprocess.Popen(
        command(*STUDY, *options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # The second run has a checkpoint and is not done
    unfinished = folder / "runs" / "dconv3_seed1"
    wait_for(lambda: (unfinished / "last_checkpoint").exists() or first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    said, complaint = first.communicate(timeout=60)
    assert first.returncode == 1, said
    assert b"Stopped. To go on: python " in complaint and b"Traceback" not in complaint
    with pytest.raises(ProcessLookupError):  # its training has ended with it
        os.kill(int((folder / "lock").read_text()), 0)
    assert not (unfinished / "result.json").exists()
    finished = folder / "runs" / "plain_seed1" / "result.json"
    before = finished.stat().st_mtime_ns
    checkpoint = (unfinished / "last_checkpoint").read_text()

    tool("run_ablation").main([*STUDY, *options])
    said = capsys.readouterr().out
    assert "2 runs in" in said and "1 of them done already" in said
    assert finished.stat().st_mtime_ns == before
    result = json.loads((unfinished / "result.json").read_text())
    assert result["starts"] == 2 and result["iterations"] == 6
    assert {"bbox/AP50", "bbox/AP70", "bbox/AP"} <= set(result["figures"])
    log = (unfinished / "output.log").read_text()
    assert f"Loading from {unfinished / checkpoint}" in log
    assert [path.name for path in unfinished.glob("*.pth")] == ["model_final.pth"]
    table = (folder / "table1.md").read_text()
    assert "| plain, dilation 4   | 1      |" in table and table in said


def test_flawed_commands_get_one_line(tool, tiny, tmp_path):
    main = tool("run_ablation").main
    with pytest.raises(
        ConfigError, match=r"rfcn on cityscapes: .* accepted: voc, coco, voc_folder"
    ):
        main(["--table", "1", "--method", "rfcn", "--data", "cityscapes"])
    for text in ("wide", "wide MODEL.RFCN.CONV_DIM", "a/b MODEL.RFCN.CONV_DIM 8"):
        with pytest.raises(ConfigError, match=r"--arm '.*': expected a name"):
            main([*STUDY, "--arm", text])
    with pytest.raises(SystemExit):
        main([*STUDY, "--iterations", "0"])
    with pytest.raises(SystemExit):
        main(["--table", "2", "--method", "rfcn", "--data", "digits"])


def test_data_that_are_missing_get_one_line(tmp_path):
    words = ["--table", "1", "--method", "deeplab", "--data", "voc", "--output", tmp_path / "study"]
    done = subprocess.run(
        command(*words, "MODEL.WEIGHTS", ""),
        env=environment(DETECTRON2_DATASETS=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: DATASETS: voc_2012_sem_seg_train_aug" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "study").exists()
