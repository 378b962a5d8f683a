"""tools/export_model.py: writes a file, compares it with the network, and says what is wrong."""

import pytest
import torch
from conftest import CONFIG
from detectron2.modeling import build_model

from d2_deform.engine import ConfigError, load_config
from d2_deform.export import formats


@pytest.fixture(scope="module")
def export_model(tool):
    return tool("export_model")


@pytest.fixture
def weights(tiny, tmp_path):
    """Of an untrained network."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, tiny, use_gpu=False))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def run(export_model, tiny, weights, tmp_path, capsys):
    def run(*flags, format="torchscript", opts=()):
        arguments = ["--config-file", CONFIG, "--format", format, *flags]
        arguments += ["--output", str(tmp_path / "out" / "model")]
        export_model.main([*arguments, "MODEL.WEIGHTS", str(weights), *tiny, *opts])
        return capsys.readouterr().out.splitlines()[-2:]

    return run


def test_writes_a_file_and_compares_it(run, digits, tmp_path):
    pictures = [str(digits / "JPEGImages" / f"00000{i}.jpg") for i in (0, 1)]
    compared, summary = run("--input", *pictures, opts=("INPUT.MIN_SIZE_TEST", "80"))
    assert compared.startswith("on 2 pictures as the model: ")
    assert " 0 without a partner, " in compared and " threads" in compared
    path = tmp_path / "out" / "model"
    assert summary.startswith(
        f"{path}: RFCN as torchscript, image (3, H, W) -> boxes, scores, classes; "
    )
    found = {"input_format": "", "min_size": "", "max_size": "", "classes": ""}
    torch.jit.load(str(path), _extra_files=found)
    assert found["input_format"] == b"BGR" and found["min_size"] == b"80"
    assert found["classes"].startswith(b'["')

    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"--output .*model exists and stays"):
        run()
    assert path.read_bytes() == before


def test_a_backbone(run, digits):
    picture = str(digits / "JPEGImages" / "000000.jpg")
    compared, summary = run("--backbone", "--input", picture)
    assert compared.startswith("on 1 pictures as the model: values within 0")
    assert "backbone as torchscript, image (3, H, W) -> res5; " in summary


@pytest.mark.parametrize(
    "opts, message",
    [
        (("TEST.SOFT_NMS.ENABLED", "True"), r"TEST\.SOFT_NMS\.ENABLED: .* set it to False\."),
        (("MODEL.WEIGHTS", ""), r"MODEL\.WEIGHTS is empty"),
        (("MODEL.RFCN.DEFORM_POOL", "False"), r"MODEL\.WEIGHTS: .* is another network's"),
    ],
)
def test_says_what_is_wrong(run, tmp_path, opts, message):
    with pytest.raises(ConfigError, match=message):
        run(opts=opts)
    assert not (tmp_path / "out").exists()


def test_missing_package(run, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx and onnxscript: pip install"):
        run(format="onnx")


def test_unknown_format(run, capsys):
    with pytest.raises(SystemExit):
        run(format="caffe2")
    assert "invalid choice: 'caffe2'" in capsys.readouterr().err
