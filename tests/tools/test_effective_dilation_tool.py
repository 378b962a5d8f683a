"""tools/effective_dilation.py: undeformed filters score their dilation; nothing is overwritten."""

import json
import shutil

import cv2
import pytest
import torch
from conftest import CONFIG
from detectron2.modeling import build_model

from d2_deform.engine import ConfigError, load_config

LIMITS = ("--size-limits", "24", "36")  # as the digits are 64 pixels high at most


@pytest.fixture(scope="module")
def dilation(tool):
    return tool("effective_dilation")


@pytest.fixture
def weights(tiny, tmp_path):
    """Of an untrained network: its filters are not deformed."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, tiny, use_gpu=False))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def run(dilation, output, weights, tiny, *flags):
    return dilation.main(
        [
            *("--config-file", CONFIG, "--output", str(output), *LIMITS, *flags),
            *(*tiny, "MODEL.RESNETS.RES5_DILATION", "2", "MODEL.DEVICE", "cpu"),
            *("MODEL.WEIGHTS", str(weights)),
        ]
    )


def test_an_undeformed_network(dilation, weights, tiny, tmp_path, capsys):
    layers = run(dilation, tmp_path / "out", weights, tiny)
    assert len(layers) == 3
    for layer in layers.values():
        for values in layer.by_class.values():
            assert values.count > 0
            assert (values.mean, values.std) == (2.0, 0.0)

    lines = capsys.readouterr().out.splitlines()
    assert "3 deformable layers; res5b conv2: small 2.00, medium 2.00, large 2.00" in lines[-1]
    for end in ("md", "png", "json"):
        assert str(tmp_path / "out" / f"effective_dilation.{end}") in lines[-1]
    table = (tmp_path / "out" / "effective_dilation.md").read_text()
    assert "8 pictures of voc_folder_train" in table and table.count("2.00 ± 0.00") == 12
    assert cv2.imread(str(tmp_path / "out" / "effective_dilation.png")) is not None
    values = json.loads((tmp_path / "out" / "effective_dilation.json").read_text())
    assert values["setting"]["size_limits"] == [24, 36]
    assert len(values["layers"]) == 3


def test_the_first_pictures_and_json_elsewhere(dilation, weights, tiny, tmp_path):
    path = tmp_path / "values.json"
    layers = run(
        dilation, tmp_path / "out", weights, tiny, "--max-images", "2", "--json", str(path)
    )
    for layer in layers.values():
        assert sum(values.count for values in layer.by_class.values()) == 2 * 8 * 8  # stride 8
    assert json.loads(path.read_text())["setting"]["max_images"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("effective_dilation.md", "effective_dilation.png")
    ]


def test_other_settings_are_not_overwritten(dilation, weights, tiny, tmp_path):
    output = tmp_path / "out"
    run(dilation, output, weights, tiny, "--max-images", "1")
    run(dilation, output, weights, tiny, "--max-images", "1")  # the same: made anew
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ConfigError, match=r"other settings: max_images was 1, is 2"):
        run(dilation, output, weights, tiny, "--max-images", "2")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before

    (output / "effective_dilation.json").unlink()
    with pytest.raises(ConfigError, match=r"effective_dilation.md is there already"):
        run(dilation, output, weights, tiny, "--max-images", "1")


def test_messages(dilation, weights, tiny, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--output .*weights.pth: this is a file"):
        run(dilation, weights, weights, tiny)
    with pytest.raises(ConfigError, match=r"--json nowhere/a.json"):
        run(dilation, output, weights, tiny, "--json", "nowhere/a.json")
    with pytest.raises(ConfigError, match=r"--size-limits: \(9.0, 9.0\) given"):
        run(dilation, output, weights, tiny, "--size-limits", "9", "9")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere.pth"):
        run(dilation, output, tmp_path / "nowhere.pth", tiny)
    with pytest.raises(ConfigError, match=r"no data set named nothing"):
        run(dilation, output, weights, [*tiny, "DATASETS.TEST", "('nothing',)"])
    with pytest.raises(ConfigError, match=r"DATASETS.TEST is empty"):
        run(dilation, output, weights, [*tiny, "DATASETS.TEST", "()"])
    with pytest.raises(ConfigError, match=r"another network's: it also has backbone.res5"):
        run(dilation, output, weights, [*tiny, "MODEL.DEFORM.NUM_LAYERS", "2"])
    assert not output.exists()


def test_a_plain_network(dilation, tiny, tmp_path):
    plain = [*tiny, "MODEL.DEFORM.NUM_LAYERS", "0"]
    path = tmp_path / "plain.pth"
    model = build_model(load_config(CONFIG, plain, use_gpu=False))
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(ConfigError, match=r"backbone has no deformable convolution"):
        run(dilation, tmp_path / "out", path, plain)


def test_a_picture_that_cannot_be_read(dilation, digits, weights, tiny, tmp_path):
    folder = shutil.copytree(digits, tmp_path / "broken")
    picture = sorted((folder / "JPEGImages").iterdir())[0]
    picture.write_text("no picture")
    options = [*tiny, "DATASETS.VOC_FOLDER.ROOT", str(folder)]
    with pytest.raises(ConfigError, match=picture.name):
        run(dilation, tmp_path / "out", weights, options)
