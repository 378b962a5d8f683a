"""tools/train_net.py from the command line to the results."""

import json
import math
import os
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import CONFIG, REPOSITORY
from detectron2.engine import DefaultPredictor, default_argument_parser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2_deform.engine import ConfigError, load_config


@pytest.fixture(scope="module")
def train_net(tool):
    return tool("train_net")


def arguments(*words):
    return default_argument_parser().parse_args(["--config-file", CONFIG, *map(str, words)])


def iterations(folder):
    with open(folder / "metrics.json") as file:
        lines = [json.loads(line) for line in file]
    return [line["iteration"] for line in lines]


def test_trains_resumes_evaluates_predicts(train_net, tiny, tmp_path):
    options = [*tiny, "OUTPUT_DIR", tmp_path]
    train_net.main(arguments("--num-gpus", 0, *options, "SOLVER.MAX_ITER", 20))
    weights = tmp_path / "model_final.pth"
    assert weights.exists() and (tmp_path / "config.yaml").exists()
    with open(tmp_path / "metrics.json") as file:
        last = json.loads(file.readlines()[-1])
    assert last["iteration"] == 20 and 0 <= last["bbox/AP50"] <= 100  # after training
    with open(tmp_path / "metrics.json") as file:
        first = json.loads(file.readlines()[0])
    assert math.isfinite(first["total_loss"])
    assert "offset/backbone.res5.1.conv2_offset/mean" in first
    assert "offset/roi_heads.cls_pool.offset_conv/max" in first
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "offset/backbone.res5.1.conv2_offset/max" in events.Tags()["scalars"]

    train_net.main(arguments("--num-gpus", 0, "--resume", *options, "SOLVER.MAX_ITER", 22))
    checkpoint = torch.load(weights, weights_only=False)
    assert checkpoint["iteration"] == 21
    assert min(iterations(tmp_path)[1:]) >= 20  # no iteration was run again

    evaluated = train_net.main(
        arguments("--num-gpus", 0, "--eval-only", *options, "MODEL.WEIGHTS", weights)
    )
    assert {"AP", "AP50", "AP70", "AP75"} <= set(evaluated["bbox"])

    cfg = load_config(CONFIG, [*tiny, "MODEL.WEIGHTS", str(weights)], use_gpu=False)
    folder = os.path.join(cfg.DATASETS.VOC_FOLDER.ROOT, "JPEGImages")
    image = cv2.imread(os.path.join(folder, sorted(os.listdir(folder))[0]))
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert instances.image_size == image.shape[:2]
    assert instances.has("pred_boxes") and instances.has("scores") and instances.has("pred_classes")


def test_test_time_augmentation(train_net, tiny, tmp_path):
    results = train_net.main(
        arguments(
            *("--num-gpus", 0, "--eval-only", *tiny, "OUTPUT_DIR", tmp_path),
            *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.FLIP", False),
        )
    )
    assert set(results) == {"bbox", "bbox_TTA"}


def test_expected_results_are_verified(train_net, tiny, tmp_path):
    expected = "[['bbox', 'AP', 101.0, 0.5]]"
    with pytest.raises(SystemExit):
        train_net.main(
            arguments(
                *("--num-gpus", 0, "--eval-only", *tiny, "OUTPUT_DIR", tmp_path),
                *("TEST.EXPECTED_RESULTS", expected),
            )
        )


def run_tool(*words):
    environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"}
    script = os.path.join(REPOSITORY, "tools", "train_net.py")
    return subprocess.run(
        [sys.executable, script, *map(str, words)], env=environment, capture_output=True, text=True
    )


def test_command_line(tiny, tmp_path):
    done = run_tool("--config-file", CONFIG, *tiny, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_final.pth").exists()
    assert "for convolution offsets" in done.stdout and "bbox" in done.stdout


def test_a_flawed_command_gets_one_line():
    done = run_tool("--config-file", CONFIG, "MODEL.DEFORM.NUM_LAYER", 3)
    assert done.returncode == 1
    assert "error: options: there is no config key MODEL.DEFORM.NUM_LAYER." in done.stderr
    assert "Traceback" not in done.stderr


def test_classifiers_have_a_tool_of_their_own(train_net, tmp_path):
    options = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "INPUT.CLASSIFICATION.CROP_SIZE", 64]
    options += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path]
    with pytest.raises(ConfigError, match=r"ImageClassifier, which tools/pretrain_classifier.py"):
        train_net.main(arguments("--num-gpus", 0, "--eval-only", *options))
