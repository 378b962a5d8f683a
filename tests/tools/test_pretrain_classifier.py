"""tools/pretrain_classifier.py from objects of Deformed Digits to a detector's log."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import CONFIG, REPOSITORY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

from d2_deform import model_zoo
from d2_deform.data import register_voc_folder
from d2_deform.engine import ConfigError, DeformTrainer, load_config

CLASSIFIER = model_zoo.get_config_file("Image-Folder/classifier_thin_R_18.yaml")


@pytest.fixture(scope="module")
def crops(tool, digits, tmp_path_factory):
    """The folder's objects; the same to train and to validate."""
    root = tmp_path_factory.mktemp("crops")
    for split in ("train", "val"):
        name = f"test_pretrain_classifier_{split}"
        register_voc_folder(name, str(digits), "train")
        try:
            tool("crop_objects").crop_objects(name, str(root / split))
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    return root


@pytest.fixture
def options(crops, tmp_path):
    return [
        *("DATASETS.IMAGE_FOLDER.ROOT", str(crops)),
        *("DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
        *("INPUT.CLASSIFICATION.CROP_SIZE", "32"),
        *("INPUT.MIN_SIZE_TEST", "32"),
        *("SOLVER.IMS_PER_BATCH", "4"),
        *("SOLVER.CHECKPOINT_PERIOD", "2"),
        *("OUTPUT_DIR", str(tmp_path)),
    ]


@pytest.fixture(scope="module")
def pretrain(tool):
    def main(*words):
        words = ["--config-file", CLASSIFIER, "--num-gpus", 0, *words]
        return tool("pretrain_classifier").main(
            default_argument_parser().parse_args([*map(str, words)])
        )

    return main


def test_trains_resumes_evaluates(pretrain, options, tmp_path):
    pretrain(*options, "SOLVER.MAX_ITER", 3)
    first = torch.load(tmp_path / "backbone.pth")["model"]
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")  # as if killed after the third
    pretrain("--resume", *options, "SOLVER.MAX_ITER", 5)
    with open(tmp_path / "metrics.json") as file:
        lines = [json.loads(line) for line in file]
    assert lines[-1]["iteration"] == 5 and 0 <= lines[-1]["classification/top1"] <= 100
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 4
    assert checkpoint["model"]["backbone.stem.conv1.norm.num_batches_tracked"] == 5
    second = torch.load(tmp_path / "backbone.pth")["model"]
    assert not torch.equal(first["stem.conv1.weight"], second["stem.conv1.weight"])

    results = pretrain("--eval-only", *options, "MODEL.WEIGHTS", tmp_path / "model_final.pth")
    assert results["classification"]["top1"] == lines[-1]["classification/top1"]


def test_the_quick_starts_detector_takes_it_up(
    pretrain, options, tiny, tmp_path, caplog, monkeypatch
):
    pretrain(*options, "SOLVER.MAX_ITER", 1)
    weights = tmp_path / "backbone.pth"
    detector = [*tiny, "OUTPUT_DIR", str(tmp_path / "detector"), "MODEL.WEIGHTS", str(weights)]
    trainer = DeformTrainer(load_config(CONFIG, detector, use_gpu=False))
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="detectron2"):
        trainer.resume_or_load(resume=False)
    assert "Following weights matched with submodule backbone" in caplog.text
    state = trainer.model.backbone.state_dict()
    for name, value in torch.load(weights)["model"].items():
        assert torch.equal(state[name], value), name


def test_the_other_networks_have_a_tool_of_their_own(pretrain, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"META_ARCHITECTURE is RFCN; .* tools/train_net.py the"):
        pretrain("--config-file", CONFIG, "--eval-only", *tiny, "OUTPUT_DIR", tmp_path)


def test_command_line(crops, options, tmp_path):
    """An unreadable picture, met by a data loader's process, ends the program with one line."""
    flawed = tmp_path / "flawed"
    (flawed / "train" / "a").mkdir(parents=True)
    (flawed / "train" / "a" / "1.jpg").write_bytes(b"no picture")
    script = os.path.join(REPOSITORY, "tools", "pretrain_classifier.py")
    words = ["--config-file", CLASSIFIER, "--num-gpus", "0", *options, "DATASETS.TEST", "()"]
    words += ["DATASETS.IMAGE_FOLDER.ROOT", str(flawed), "DATALOADER.NUM_WORKERS", "1"]
    environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {flawed}/train/a/1.jpg cannot be read as a picture (")
