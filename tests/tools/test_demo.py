"""tools/demo.py: draws pictures, with and without sampling; says what it lacks."""

import os
import shutil

import cv2
import pytest
import torch
from conftest import CONFIG
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2_deform.engine import ConfigError, load_config


@pytest.fixture(scope="module")
def demo(tool):
    return tool("demo")


@pytest.fixture
def weights(tiny, tmp_path):
    """Of an untrained network."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, tiny, use_gpu=False))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def run(demo, digits, output, weights, tiny, *flags):
    demo.main(
        [
            *("--config-file", CONFIG, "--input", str(digits / "JPEGImages" / "00000[01].jpg")),
            *("--output", str(output), *flags),
            *("--opts", "MODEL.WEIGHTS", str(weights), *tiny),
        ]
    )


def test_draws_into_a_folder(demo, digits, weights, tiny, tmp_path):
    run(demo, digits, tmp_path / "drawn", weights, tiny)
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["000000.jpg", "000001.jpg"]
    assert cv2.imread(str(drawn[0])).shape == (64, 64, 3)


def test_shows_sampling_beside_the_picture(demo, digits, weights, tiny, tmp_path, monkeypatch):
    predicted = []
    model_class = type(build_model(load_config(CONFIG, tiny, use_gpu=False)))
    forward = model_class.forward
    monkeypatch.setattr(
        model_class, "forward", lambda self, inputs: predicted.append(1) or forward(self, inputs)
    )
    flags = ("--show-sampling", "--confidence-threshold", "0.01")
    run(demo, digits, tmp_path / "drawn", weights, tiny, *flags)
    assert len(predicted) == 2  # once a picture
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        *("000000.jpg", "000000_sampling.png", "000001.jpg", "000001_sampling.png")
    ]
    assert cv2.imread(str(tmp_path / "drawn" / "000000.jpg")).shape == (64, 64, 3)
    sampling = cv2.imread(str(tmp_path / "drawn" / "000000_sampling.png"))
    assert sampling.shape[1] > 3 * 480  # three panels


def test_predicts_where_the_data_are_not(demo, digits, weights, tiny, tmp_path):
    """With the config that training leaves, which names a folder of another machine."""
    cfg = load_config(CONFIG, tiny, use_gpu=False)
    cfg.DATASETS.VOC_FOLDER.ROOT = "/nowhere"
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    DatasetCatalog.remove("voc_folder_train")
    MetadataCatalog.remove("voc_folder_train")
    demo.main(
        [
            *("--config-file", str(config), "--input", str(digits / "JPEGImages" / "000000.jpg")),
            *("--output", str(tmp_path / "drawn"), "--confidence-threshold", "0.01"),
            *("--show-sampling", "--opts", "MODEL.WEIGHTS", str(weights)),
        ]
    )
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_overwrites_no_picture_given(demo, digits, tmp_path):
    pictures = shutil.copytree(digits / "JPEGImages", tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    for given in (str(pictures), str(pictures / "000000.jpg")):
        with pytest.raises(ConfigError, match=r"--output .*000000.jpg would be overwritten"):
            demo.output_paths(demo.find_pictures([given]), given, False)
    with pytest.raises(ConfigError, match=r"a_sampling.png would be overwritten"):
        demo.output_paths(["x/a.jpg", "y/a_sampling.png"], "y", True)
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before


def test_messages(demo, digits, weights, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"MODEL.WEIGHTS is empty"):
        demo.main(["--config-file", CONFIG, "--input", str(digits)])
    with pytest.raises(ConfigError, match=r"--output .*one.jpg: 2 pictures need a folder"):
        run(demo, digits, tmp_path / "one.jpg", weights, tiny)
    with pytest.raises(ConfigError, match=r"--input .*: no picture is found there"):
        demo.find_pictures([str(tmp_path / "*.gif")])


def test_unreadable_picture_is_left_out(demo, digits, weights, tiny, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    good = digits / "JPEGImages" / "000000.jpg"
    demo.main(
        [
            *("--config-file", CONFIG, "--input", str(bad), str(good)),
            *("--output", str(tmp_path / "drawn"), "--opts", "MODEL.WEIGHTS", str(weights), *tiny),
        ]
    )
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["000000.jpg"]


CONFIGS = os.path.dirname(CONFIG)


def test_draws_segmentation(demo, digits, tmp_path):
    picture = str(digits / "JPEGImages" / "000000.jpg")
    config = os.path.join(CONFIGS, "VOC-Segmentation", "deeplab_R_101_dconv3.yaml")
    small = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    small += ["MODEL.RESNETS.WIDTH_PER_GROUP", "16", "INPUT.MIN_SIZE_TEST", "64"]
    model = build_model(load_config(config, [*small, "MODEL.WEIGHTS", ""], with_data=False))
    weights = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, weights)
    output = tmp_path / "drawn.png"
    arguments = ["--config-file", config, "--input", picture, "--output", str(output)]
    demo.main([*arguments, "--opts", "MODEL.WEIGHTS", str(weights), *small])
    assert cv2.imread(str(output)).shape == cv2.imread(picture).shape
    with pytest.raises(ConfigError, match="--show-sampling is for detectors"):
        demo.main([*arguments, "--show-sampling", "--opts", "MODEL.WEIGHTS", str(weights), *small])


@pytest.mark.parametrize(
    "config, says",
    [("rfcn_R_101", "cannot predict on new pictures"), ("rpn_R_101", "regions and no objects")],
)
def test_networks_that_do_not_detect_by_themselves_are_told(demo, tmp_path, config, says):
    path = os.path.join(CONFIGS, "VOC-Ablation", f"{config}.yaml")
    with pytest.raises(ConfigError, match=says):
        demo.main(["--config-file", path, "--input", "a.jpg", "--opts", "MODEL.WEIGHTS", ""])
