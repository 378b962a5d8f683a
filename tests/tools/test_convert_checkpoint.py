"""tools/convert_checkpoint.py: from a file to a file that the config's network loads."""

import re

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from d2_deform import model_zoo
from d2_deform.engine import ConfigError
from d2_deform.engine.weights import load_backbone_weights

CONFIG = "VOC-Detection/rfcn_R_50_dconv3_dpool.yaml"
OPTS = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.DEFORM.NUM_LAYERS", "0", "MODEL.RFCN.DEFORM_POOL", "False"),
    *("MODEL.RFCN.CONV_DIM", "8"),
]


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture
def convert(tool, tmp_path):
    def convert(source, *words, output="ours.pth", opts=OPTS):
        config = model_zoo.get_config_file(CONFIG)
        files = ["--input", str(source), "--output", str(tmp_path / output)]
        arguments = ["--from", "torchvision", "--config-file", config, *files, *words, *opts]
        return tool("convert_checkpoint").main(arguments)

    return convert


def test_the_file_loads_and_says_how(convert, resnet18, tmp_path, capsys):
    assert convert(resnet18) == 0
    told = capsys.readouterr().out
    assert "left out: fc.weight: the classifier of ImageNet" in told
    assert "new, as in an untrained network: roi_heads.cls_score.weight" in told
    path = str(tmp_path / "ours.pth")
    assert f"{' '.join(OPTS)} MODEL.WEIGHTS {path}" in told
    cfg = model_zoo.get_config(CONFIG)
    cfg.merge_from_list([*OPTS, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    load_backbone_weights(model, path)
    expected = torch.load(resnet18, weights_only=True)["layer4.1.bn2.running_var"]
    assert torch.equal(model.backbone.res5[1].conv2.norm.running_var, expected)


def test_what_is_amiss_writes_nothing_unless_asked_to(convert, resnet18, tmp_path, capsys):
    weights = torch.load(resnet18, weights_only=True)
    weights["layer4.2.conv1.weight"] = weights.pop("layer4.1.conv1.weight")
    flawed = tmp_path / "flawed.pth"
    torch.save(weights, flawed)
    assert convert(flawed) == 1
    told = capsys.readouterr().out
    assert re.search("MISSING in the file: backbone.res5.1.conv1.weight", told)
    assert re.search("NOT IN THE NETWORK of the config: backbone.res5.2.conv1.weight", told)
    assert "Nothing is written" in told
    assert list(tmp_path.iterdir()) == [flawed]
    assert convert(flawed, "--allow-incomplete") == 2
    assert (tmp_path / "ours.pth").is_file()


def test_overwrites_nothing_and_needs_a_name_that_is_known_for_weights(convert, resnet18, tmp_path):
    there = tmp_path / "ours.pth"
    there.write_text("mine")
    with pytest.raises(ConfigError, match=r"ours\.pth: it exists and stays"):
        convert(resnet18)
    assert there.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"ours\.pkl: expected a name that ends in \.pth"):
        convert(resnet18, output="ours.pkl")
    with pytest.raises(ConfigError, match=r"Add these here.*PIXEL_MEAN"):
        convert(resnet18, output="b.pth", opts=[*OPTS, "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]"])
    assert list(tmp_path.iterdir()) == [there]
