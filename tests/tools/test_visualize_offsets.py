"""tools/visualize_offsets.py: figures of every network; what it refuses, in one line."""

import json
import os
import re

import cv2
import pytest
import torch
from conftest import CONFIG, REPOSITORY
from detectron2.modeling import build_model

from d2_deform.engine import ConfigError, load_config

CONFIGS = os.path.dirname(CONFIG)
SMALL_RESNET = [
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.RESNETS.NORM", "BN", "INPUT.MIN_SIZE_TEST", "64"),
]
SMALL_AIR = [
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.NORM", "BN", "INPUT.MIN_SIZE_TEST", "64"),
]


@pytest.fixture(scope="module")
def visualize(tool):
    return tool("visualize_offsets")


@pytest.fixture
def picture(digits):
    return digits / "JPEGImages" / "000000.jpg"


def save_weights(config, opts, path):
    """Of an untrained network whose offsets are not zero."""
    torch.manual_seed(0)
    model = build_model(load_config(config, [*opts, "MODEL.WEIGHTS", ""], with_data=False))
    for name, parameter in model.named_parameters():
        if "offset" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "conv_out.norm.weight" in name:  # else the untrained AIR's maps grow block by block
            torch.nn.init.zeros_(parameter)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def weights(tiny, tmp_path):
    return save_weights(CONFIG, tiny, tmp_path / "weights.pth")


@pytest.fixture
def run(visualize, picture, weights, tiny):
    def run_on(*flags, pictures=(picture,), weights=weights, opts=()):
        visualize.main(
            [
                *("--config-file", CONFIG, "--input", *map(str, pictures), *map(str, flags)),
                *("--opts", "MODEL.WEIGHTS", str(weights), *tiny, *opts),
            ]
        )

    return run_on


def test_a_row_for_each_location_and_detection(run, tmp_path):
    threshold = ("--confidence-threshold", 0.0)
    run("--location", "30,22", "0,64", "--detections", 2, *threshold, "--output", tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "000000_offsets.png"
    figure = cv2.imread(str(path))
    assert figure.shape[1] == 2 * 480 + 3 * 12
    assert figure.shape[0] > 2 * 480 + 2 * 240  # a detection's window has half the height at least


def test_same_again_is_no_error_and_other_contents_are_kept(run, tmp_path):
    run("--location", "30,22", "--output", tmp_path / "out")
    path = tmp_path / "out" / "000000_offsets.png"
    before = path.read_bytes()
    run("--location", "30,22", "--output", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"000000_offsets.png exists with other contents"):
        run("--location", "2,3", "--output", tmp_path / "out")
    assert path.read_bytes() == before


def test_page_of_several_pictures(run, digits, tmp_path):
    pictures = sorted((digits / "JPEGImages").iterdir())[:2]
    page = tmp_path / "pages" / "explorer.html"
    flags = ("--layers", 2, "--confidence-threshold", 0.0, "--html", page)
    run(*flags, pictures=pictures)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["pages"]  # no PNG
    text = page.read_text()
    assert "<title>Where quickstart looks</title>" in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    found = json.loads(data)["pictures"]
    assert [one["name"] for one in found] == ["000000.jpg", "000001.jpg"]
    assert [len(one["layers"]) for one in found] == [2, 2]
    assert all(one["detections"] and "bins" in one["detections"][0] for one in found)
    with pytest.raises(ConfigError, match=r"explorer.html exists with other contents"):
        run(*flags)
    assert page.read_text() == text
    with pytest.raises(ConfigError, match=r"--html .*pages: this is a folder"):
        run("--html", page.parent)


@pytest.mark.parametrize(
    "name, opts",
    [
        ("COCO-Detection/faster_rcnn_R_50_dconv3_dpool", SMALL_RESNET),
        ("COCO-Detection/faster_rcnn_R_50_FPN_dconv13_dpool", SMALL_RESNET),
        ("COCO-Detection/rfcn_R_101_dconv3_dpool_release", SMALL_RESNET),
        ("COCO-Detection/rfcn_AIR_dconv3_dpool", SMALL_AIR),
        ("COCO-Detection/category_aware_rpn_R_101_dconv3", SMALL_RESNET),
        ("VOC-Segmentation/deeplab_R_101_dconv3", SMALL_RESNET),
        ("VOC-Ablation/rfcn_R_101_dconv3_dpool", SMALL_RESNET),  # on proposals made beforehand
    ],
)
def test_every_network(visualize, picture, tmp_path, name, opts):
    config = os.path.join(CONFIGS, f"{name}.yaml")
    weights = save_weights(config, opts, tmp_path / "weights.pth")
    output = tmp_path / "out"
    visualize.main(
        [
            *("--config-file", config, "--input", str(picture), "--location", "20,30"),
            *("--output", str(output), "--confidence-threshold", "0.0"),
            *("--opts", "MODEL.WEIGHTS", str(weights), *opts),
        ]
    )
    has_bins = "dpool" in name and "Ablation" not in name
    height = cv2.imread(str(output / "000000_offsets.png")).shape[0]
    assert height > 480 + (240 if has_bins else 0)
    assert height < 600 + (600 if has_bins else 0)


def test_pooling_alone_and_nothing_deformable(visualize, run, picture, tiny, tmp_path):
    plain = (*tiny, "MODEL.DEFORM.NUM_LAYERS", "0")
    weights = save_weights(CONFIG, plain, tmp_path / "pool.pth")
    opts = ("MODEL.DEFORM.NUM_LAYERS", "0")
    output = ("--output", tmp_path / "out")
    run(*output, "--confidence-threshold", 0.0, weights=weights, opts=opts)
    assert cv2.imread(str(tmp_path / "out" / "000000_offsets.png")).shape[0] < 600
    with pytest.raises(ConfigError, match=r"000000.jpg: there is nothing to draw"):
        run(*output, "--confidence-threshold", 1.5, weights=weights, opts=opts)

    opts = (*opts, "MODEL.RFCN.DEFORM_POOL", "False")
    weights = save_weights(CONFIG, (*tiny, *opts), tmp_path / "plain.pth")
    with pytest.raises(ConfigError, match=r"has no deformable layer"):
        run(*output, weights=weights, opts=opts)


def test_messages(run, picture, weights, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"--location 65,3: it is outside .*, which is 64 x 64"):
        run("--location", "65,3")
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    with pytest.raises(ConfigError, match=r"bad.jpg: it cannot be read as a picture"):
        run(pictures=[picture, bad])
    with pytest.raises(ConfigError, match=r"--input .*none.jpg: no picture is found there"):
        run(pictures=[tmp_path / "none.jpg"])
    with pytest.raises(ConfigError, match=r"2 pictures would be drawn into 000000_offsets.png"):
        copy = tmp_path / "000000.jpg"
        copy.write_bytes(picture.read_bytes())
        run("--output", tmp_path / "out", pictures=[picture, copy])
    with pytest.raises(ConfigError, match=r"--output .*bad.jpg: this is a file"):
        run("--output", bad)
    with pytest.raises(ConfigError, match=r"group: 1 given, accepted is 0 to 0"):
        run("--group", 1, "--output", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"bad.jpg cannot be read as weights"):
        run(weights=bad)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(run, weights, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"is another network's: it lacks .*conv[12]_offset"):
        run(opts=("MODEL.DEFORM.NUM_LAYERS", "6"))
    with pytest.raises(ConfigError, match=r"is another network's: it also has .*_offset"):
        run(opts=("MODEL.DEFORM.NUM_LAYERS", "1"))
    with pytest.raises(
        ConfigError, match=r"is another network's: it lacks .or has in another shape"
    ):
        run(opts=("MODEL.RFCN.CONV_DIM", "16"))


@pytest.mark.parametrize("given", [["--location", "3"], ["--location", "a,b"], ["--layers", "0"]])
def test_arguments(run, given, capsys):
    with pytest.raises(SystemExit):
        run(*given)
    assert "given" in capsys.readouterr().err


def test_from_the_command_line(visualize, digits):
    assert os.access(os.path.join(REPOSITORY, "tools", "visualize_offsets.py"), os.X_OK)
    help_text = visualize.get_parser().format_help()
    assert "beside the undeformed pattern" in help_text
