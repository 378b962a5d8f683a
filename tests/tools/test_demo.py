"""tools/demo.py: draws pictures, with and without sampling; says what it lacks."""

import cv2
import pytest
import torch
from conftest import CONFIG
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


def test_shows_sampling(demo, digits, weights, tiny, tmp_path):
    flags = ("--show-sampling", "--confidence-threshold", "0.01")
    run(demo, digits, tmp_path / "drawn", weights, tiny, *flags)
    picture = cv2.imread(str(tmp_path / "drawn" / "000000.jpg"))
    assert picture.shape[1] > 3 * 480  # three panels


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
