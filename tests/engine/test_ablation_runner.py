"""What the runner of ablations starts, keeps, resumes and refuses; a stand-in does the training."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from d2_deform import model_zoo
from d2_deform.analysis.ablation import METHODS, TABLES, find_study
from d2_deform.engine import ConfigError, load_config
from d2_deform.engine.ablation import AblationRunner, common_options, shorten_schedule
from d2_deform.engine.ablation_runs import (
    Run,
    estimate_seconds_left,
    figures_by_row,
    read_runs,
)
from d2_deform.engine.study_folder import read_study

STUDY = find_study("rfcn", "digits")

# Writes what Detectron2 would: a line of metrics for every iteration, the figures with the last
STAND_IN = """
import json, os, sys, time
words = sys.argv[sys.argv.index("--resume") + 1 :]
options = dict(zip(words[::2], words[1::2]))
folder, last = options["OUTPUT_DIR"], int(options["SOLVER.MAX_ITER"]) - 1
print("trains", options["SEED"], options["MODEL.DEFORM.NUM_LAYERS"])
for name in ("model_0000000.pth", "model_final.pth"):
    open(os.path.join(folder, name), "w").close()
if os.path.exists(os.path.join(folder, "..", "..", "fail_" + os.path.basename(folder))):
    sys.exit("no memory left")
with open(os.path.join(folder, "metrics.json"), "a") as file:
    for iteration in range(last + 1):
        record = {"iteration": iteration, "time": 0.5, "total_loss": 1.0}
        if iteration == last:
            figure = 10.0 * int(options["SEED"]) + int(options["MODEL.DEFORM.NUM_LAYERS"])
            record.update({"bbox/AP50": figure, "bbox/AP70": figure / 2, "bbox/AP": 1.0})
        print(json.dumps(record), file=file, flush=True)
        time.sleep(float(os.environ.get("SECONDS_AN_ITERATION", "0")))
"""


@pytest.fixture
def train_tool(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(textwrap.dedent(STAND_IN))
    return str(path)


@pytest.fixture
def no_picture(monkeypatch):
    """Saves a second for every run."""
    monkeypatch.setattr("d2_deform.engine.ablation.draw_comparison", lambda *_: b"")


@pytest.fixture
def make(tmp_path, train_tool):
    def build(folder="study", study=STUDY, iterations=4, **kwargs):
        path = str(tmp_path / folder)
        return AblationRunner(study, path, train_tool, iterations=iterations, num_gpus=0, **kwargs)

    return build


def contents(folder):
    return {
        path: (folder / path).read_bytes()
        for path in (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if path != "lock"
    }


def test_runs_rows_and_seeds_and_writes_tables(make, tmp_path, capsys):
    assert make().run(1, [1, 2], ["plain", "dconv3"]) == []
    folder = tmp_path / "study"
    assert figures_by_row(read_runs(str(folder)))["dconv3"] == {
        1: {"bbox/AP50": 13.0, "bbox/AP70": 6.5, "bbox/AP": 1.0},
        2: {"bbox/AP50": 23.0, "bbox/AP70": 11.5, "bbox/AP": 1.0},
    }
    assert "3 deformable layers | 2      | 18.00 ± 7.07 |" in (folder / "table1.md").read_text()
    assert (folder / "table1.csv").read_text().count("\n") == 1 + 5 * 3
    lines = (folder / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 and lines[0].startswith("row,seed,iterations,seconds_per_iteration,")
    assert lines[1].startswith("dconv3,1,4,0.5,1,") and lines[1].endswith(",1.0,13.0,6.5")
    assert (folder / "table1.png").read_bytes().startswith(b"\x89PNG")
    study = read_study(str(folder))
    assert study.results == figures_by_row(read_runs(str(folder)))
    assert study.settings["rows"].keys() == {"plain", "dconv3"}
    assert not list(folder.rglob("*.tmp"))
    run = folder / "runs" / "dconv3_seed2"
    assert (run / "output.log").read_text() == "trains 2 3\n"
    assert (run / "model_final.pth").exists() and not (run / "model_0000000.pth").exists()
    result = json.loads((run / "result.json").read_text())
    assert (result["row"], result["seed"], result["starts"]) == ("dconv3", 2, 1)
    assert result["seconds_per_iteration"] == 0.5 and result["seconds"] > 0
    order = re.findall(r"^\[(\d)/4\] (\w+ seed \d): .*AP50", capsys.readouterr().out, re.MULTILINE)
    assert [number for number, _ in order] == ["1", "2", "3", "4"]
    assert [name for _, name in order] == [
        *("plain seed 1", "dconv3 seed 1", "plain seed 2", "dconv3 seed 2")
    ]


def test_a_studys_own_options_come_before_the_users():
    study = find_study("rfcn", "digits_warp8")
    options = common_options(study, None, ["DATASETS.TEST", "('deformed_digits_warp8_val',)"])
    assert tuple(options[: len(study.options)]) == study.options
    cfg = load_config(model_zoo.get_config_file(study.config), options, with_data=False)
    assert cfg.DATASETS.TRAIN == ("deformed_digits_warp8_train",)
    assert cfg.DATASETS.TEST == ("deformed_digits_warp8_val",)


def test_what_is_done_is_not_done_again(no_picture, make, tmp_path, capsys):
    make().run(1, [1], ["plain", "dconv3"])
    before = contents(tmp_path / "study" / "runs")
    capsys.readouterr()
    make().run(1, [1], ["plain", "dconv3"])
    assert "2 runs" in (said := capsys.readouterr().out) and "2 of them done already" in said
    assert contents(tmp_path / "study" / "runs") == before
    # Table 3 shares two rows with table 1; seeds may be added
    make().run(3, [1, 2], ["plain", "dil8"])
    after = contents(tmp_path / "study" / "runs")
    assert {path: after[path] for path in before} == before
    assert {path.partition("/")[0] for path in set(after) - set(before)} == {
        *("dil8_seed1", "plain_seed2", "dil8_seed2")
    }
    assert "3 deformable layers" in (tmp_path / "study" / "table3.md").read_text()


def test_a_failure_does_not_end_the_others(no_picture, make, tmp_path, capsys):
    runner = make()
    runner.run(1, [1], ["dconv1"])
    mark = tmp_path / "study" / "fail_plain_seed1"
    mark.touch()
    failed = runner.run(1, [1], ["plain", "dconv3"])
    assert [run.name for run in failed] == ["plain seed 1"]
    said = capsys.readouterr().out
    log = tmp_path / "study" / "runs" / "plain_seed1" / "output.log"
    assert f"[1/2] plain seed 1: FAILED (exit 1): no memory left [{log}]" in said
    assert set(figures_by_row(read_runs(runner.folder))) == {"dconv1", "dconv3"}
    mark.unlink()
    assert runner.run(1, [1], ["plain", "dconv3"]) == []
    result = json.loads((log.parent / "result.json").read_text())
    assert result["starts"] == 2


def test_other_settings_are_refused_and_nothing_is_overwritten(no_picture, make, tmp_path):
    make().run(1, [1], ["plain"])
    before = contents(tmp_path / "study")
    with pytest.raises(ConfigError, match=r"SOLVER.MAX_ITER 4 \(now 8\).*choose another folder"):
        make(iterations=8).run(1, [1])
    with pytest.raises(ConfigError, match=r"SOLVER.BASE_LR 0.005 \(now 0.1\)"):
        make(opts=["SOLVER.BASE_LR", "0.1"]).run(1, [2])
    with pytest.raises(ConfigError, match=r"method rfcn \(now deeplab\)"):
        make(study=find_study("deeplab", "digits")).run(1, [1])
    assert contents(tmp_path / "study") == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"mine: it exists and holds no study"):
        make("mine").run(1, [1])
    with pytest.raises(ConfigError, match=r"stand_in.py: it exists and holds no study"):
        make("stand_in.py").run(1, [1])
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_arms(no_picture, make, tmp_path):
    arm = STUDY.arm("wide", {"MODEL.RFCN.CONV_DIM": "144"})
    make(arms=[arm]).run(1, [1], ["plain", "wide"])
    assert "wide: CONV_DIM 144" in (tmp_path / "study" / "table1.md").read_text()
    other = STUDY.arm("wide", {"MODEL.RFCN.CONV_DIM": "160"})
    with pytest.raises(ConfigError, match=r"wide .*144.* \(now .*160"):
        make(arms=[other]).run(1, [1], ["wide"])
    with pytest.raises(ConfigError, match=r"--arm dconv3: there is a row of this name already"):
        make(arms=[STUDY.arm("dconv3", {"MODEL.RFCN.CONV_DIM": 144})])
    with pytest.raises(ConfigError, match=r"--arm lucky: SEED is set for every run"):
        make(arms=[STUDY.arm("lucky", {"SEED": 7})])


def test_mistakes_are_told_before_anything_is_run(make, tmp_path):
    with pytest.raises(ConfigError, match=r"--rows dconv9: table 1 of rfcn on digits has plain, "):
        make().run(1, [1], ["dconv9"])
    with pytest.raises(ConfigError, match=r"no config key MODEL.RFCN.CONV_DIMM"):
        make(opts=["MODEL.RFCN.CONV_DIMM", "8"])
    with pytest.raises(ConfigError, match=r"MODEL.DEFORM.NUM_LAYERS is what the rows differ in"):
        make(opts=["MODEL.DEFORM.NUM_LAYERS", "2"])
    with pytest.raises(ConfigError, match=r"SEED is set for every run"):
        make(opts=["SEED", "2"])
    with pytest.raises(ConfigError, match=r"SOLVER.MAX_ITER is given twice"):
        make(opts=["SOLVER.MAX_ITER", "2"])
    with pytest.raises(ConfigError, match=r"DATASETS.TEST is empty"):
        make(opts=["DATASETS.TEST", "()"]).run(1, [1])
    assert not (tmp_path / "study").exists()


def test_two_at_a_time_in_one_folder(make, train_tool, tmp_path):
    code = f"""
        from d2_deform.analysis.ablation import find_study
        from d2_deform.engine.ablation import AblationRunner
        study = find_study("rfcn", "digits")
        AblationRunner(
            study, {str(tmp_path / "study")!r}, {train_tool!r}, iterations=500, num_gpus=0
        ).run(1, [1], ["plain"])
    """
    environment = {**os.environ, "SECONDS_AN_ITERATION": "0.1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    metrics = tmp_path / "study" / "runs" / "plain_seed1" / "metrics.json"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = make(iterations=500)
        with pytest.raises(ConfigError, match=r"process (\d+) is at work in it"):
            second.run(1, [1], ["plain"])
        trainer = int((tmp_path / "study" / "lock").read_text())
        # Killed, it leaves its training behind, which goes on and keeps the folder
        first.kill()
        first.wait()
        with pytest.raises(ConfigError, match=rf"process {trainer} is at work in it"):
            second.run(1, [1], ["plain"])
        os.kill(trainer, 9)


def test_estimate_of_the_time_left():
    assert estimate_seconds_left({}, ["plain", "dconv3"], 5.0, 0.0) is None
    assert estimate_seconds_left({"plain": [9.0]}, [], 0.0, 0.0) == 0.0
    # By the run at work: half done in 50 seconds
    assert estimate_seconds_left({}, ["plain", "dconv3"], 50.0, 0.5) == 150.0
    # By the runs that are done; a row that is not known takes the mean of all that are
    done = {"plain": [90.0, 110.0], "dconv3": [200.0]}
    assert estimate_seconds_left(done, ["dconv3", "plain"], 50.0, 0.1) == 250.0
    assert estimate_seconds_left(done, ["plain", "dil8"], 120.0, 0.9) == 150.0


def test_schedules_keep_their_shape():
    cfg = load_config(model_zoo.get_config_file("VOC-Ablation/rfcn_R_101.yaml"), with_data=False)
    assert shorten_schedule(cfg, 3000) == [
        *("SOLVER.MAX_ITER", "3000", "SOLVER.STEPS", "(2000,)", "SOLVER.WARMUP_ITERS", "100")
    ]
    options = common_options(STUDY, 600, ["SOLVER.BASE_LR", "0.1"], use_gpu=False)
    assert options == [
        *("SOLVER.MAX_ITER", "600", "SOLVER.STEPS", "(7500,)", "SOLVER.WARMUP_ITERS", "38"),
        *("SOLVER.CHECKPOINT_PERIOD", "60", "SOLVER.BASE_LR", "0.1"),
    ]
    assert common_options(STUDY, None, [], use_gpu=False) == ["SOLVER.CHECKPOINT_PERIOD", "240"]


def test_figures_of_the_last_evaluation_alone_count(tmp_path):
    run = Run(STUDY.rows(1)[0], 1, str(tmp_path), iterations=40)
    assert run.count_iterations() == 0 and run.read_figures("bbox/AP50") is None
    lines = [
        '{"iteration": 19, "time": 0.2, "bbox/AP50": 1.0}',  # TEST.EVAL_PERIOD
        '{"iteration": 39, "time": 0.4}',
    ]
    file = tmp_path / "metrics.json"
    file.write_text("\n".join(lines) + "\n" + '{"iteration": 40, "bbox')  # cut off by a kill
    assert run.count_iterations() == 40 and run.read_figures("bbox/AP50") is None
    assert run.seconds_per_iteration() == pytest.approx(0.3)
    file.write_text(
        "\n".join(lines) + '\n{"iteration": 40, "bbox/AP50": 2.0, "offset/x/mean": 1}\n'
    )
    assert run.read_figures("bbox/AP50") == {"bbox/AP50": 2.0}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_starts_all_rows_with_the_same_weights(method):
    """What two rows share is equal to the bit, and the generator's state after it."""
    study = find_study(method, "digits")
    plain = None
    for row in [row for table in TABLES for row in study.rows(table)]:
        opts = [str(word) for pair in row.keys.items() for word in pair]
        cfg = load_config(
            model_zoo.get_config_file(study.config), opts, use_gpu=False, with_data=False
        )
        seed_all_rng(3)
        weights = build_model(cfg).state_dict()
        after = torch.rand(1)
        if plain is None:
            plain, after_plain = weights, after
        assert torch.equal(after, after_plain)
        assert set(plain) <= set(weights)
        for name, value in weights.items():
            if name in plain:
                assert torch.equal(value, plain[name]), (row.name, name)
            else:
                assert "offset" in name and not value.any(), (row.name, name)
