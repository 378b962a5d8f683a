"""tools/analyze_model.py: counts any config without weights or data; says what it lacks."""

import json
import os

import cv2
import pytest
import torch
from conftest import CONFIG
from detectron2.modeling import build_model

from d2_deform.analysis import random_picture
from d2_deform.engine import ConfigError, load_config

SMALL = ("INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu")


@pytest.fixture(scope="module")
def analyze(tool):
    return tool("analyze_model")


def run(analyze, capsys, *flags, opts=SMALL):
    analyze.main(["--config-file", CONFIG, "--num-runs", "1", *flags, *opts])
    return capsys.readouterr().out.splitlines()


def test_one_config(analyze, capsys, tmp_path):
    path = tmp_path / "cost.json"
    lines = run(analyze, capsys, "--num-inputs", "2", "--json", str(path))
    assert any("2 random picture(s) of 64 x 85 pixels, random weights, cpu" in x for x in lines)
    assert any(line.startswith("| backbone.res5.offsets ") for line in lines)
    assert lines[-1].startswith("quickstart: ") and "M parameters" in lines[-1]

    (result,) = json.loads(path.read_text())
    assert result["weights"] == result["pictures"] == "random"
    assert result["picture_sizes"] == [[64, 85], [64, 85]]
    assert set(result["total"]) == {"parameter", "flop", "activation", "runtime"}
    assert all(value > 0 for value in result["total"].values())
    assert result["num_proposals"] > 10  # with random weights too
    for task, total in result["total"].items():
        assert sum(result["by_part"][task].values()) == pytest.approx(total)


def test_two_configs(analyze, capsys, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        f'_BASE_: "{CONFIG}"\nMODEL:\n  DEFORM: {{NUM_LAYERS: 1}}\n  RFCN: {{DEFORM_POOL: False}}\n'
    )
    path = tmp_path / "cost.json"
    flags = ("--compare", str(plain), "--tasks", "parameter", "flop", "--json", str(path))
    lines = run(analyze, capsys, *flags)
    assert lines[-1].startswith("plain against quickstart: -")
    deformable, rigid = json.loads(path.read_text())
    difference = deformable["total"]["parameter"] - rigid["total"]["parameter"]
    # Two of three offset convolutions, 128 channels of 3 x 3; offsets of (11 + 1) x 3 x 3 bins
    assert difference == 2 * 18 * (128 * 9 + 1) + 2 * (11 + 1) * 9 * (128 + 1)


def test_a_network_on_fixed_proposals(analyze, capsys):
    config = os.path.join(os.path.dirname(CONFIG), "VOC-Ablation", "rfcn_R_101.yaml")
    small = [*SMALL, "MODEL.RESNETS.DEPTH", "50", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", "20"]
    flags = ["--config-file", config, "--num-runs", "1", "--tasks", "parameter", "flop"]
    analyze.main([*flags, "--num-inputs", "1", *small])
    assert capsys.readouterr().out.splitlines()[-1].endswith(", 20 proposals")


def test_given_picture_and_weights(analyze, capsys, tmp_path):
    picture, weights = tmp_path / "a.png", tmp_path / "weights.pth"
    cv2.imwrite(str(picture), random_picture(70, 64))
    model = build_model(load_config(CONFIG, SMALL, with_data=False))
    torch.save({"model": model.state_dict()}, weights)
    opts = (*SMALL, "MODEL.WEIGHTS", str(weights))
    flags = ("--tasks", "flop", "--image", str(picture), "--num-runs", "1")
    lines = run(analyze, capsys, *flags, opts=opts)
    assert any(f"1 given picture(s) of 70 x 64 pixels, {weights}, cpu" in x for x in lines)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--image", "nowhere.jpg", "--num-runs", "1"), r"nowhere\.jpg is not there"),
        (("--compare", "nowhere.yaml"), r"nowhere\.yaml: there is no such file"),
        (("--json", "nowhere/cost.json"), "there is no such folder"),
    ],
)
def test_mistakes_are_told(analyze, capsys, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(analyze, capsys, "--tasks", "parameter", *flags)
