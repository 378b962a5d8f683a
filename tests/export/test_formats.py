"""Exported files: at any size they say what the network says, also when it finds nothing."""

import logging
import runpy
import sys
from functools import cache
from pathlib import Path

import cv2
import pytest
import torch
from small_networks import build, picture, predict

from d2_deform.export import (
    ONNX_OPSET,
    build_exported,
    compare_detections,
    export_network,
    formats,
    load_exported,
)
from d2_deform.modeling.box_selector import BoxSelector

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
SETTINGS = {"input_format": "BGR", "min_size": "96", "max_size": "200"}
# Their shorter sides are min_size: the documentation's example leaves them as they are.
PICTURES = [picture(96, 128), picture(110, 96, seed=1), picture(96, 101, seed=2)]

needs_onnx = pytest.mark.skipif(
    any(formats.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime"))
    or sys.version_info < (3, 11),
    reason="the extra [onnx] is not installed, or its ONNX Runtime is too old for DeformConv",
)


@pytest.fixture(autouse=True)
def no_trace_in_the_log(monkeypatch):
    """pytest would keep all that torch can tell of its tracing, which takes as long again."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def let_one_picture_have_no_detection(model):
    """Puts the score threshold between the pictures' best scores."""
    selectors = [getattr(module, "box_selector", None) for module in model.modules()]
    (selector,) = (one for one in selectors if isinstance(one, BoxSelector))
    best = sorted(float(predict(model, image)[1].max()) for image in PICTURES)
    selector.score_thresh = (best[0] + best[1]) / 2


@cache
def exported(name, format):
    """A network and its file's contents."""
    _, model = build(name)
    if name not in ("deeplab", "classifier"):
        let_one_picture_have_no_detection(model)
    return model, export_network(build_exported(model), format, SETTINGS)


def check(name, format, path):
    model, content = exported(name, format)
    detector = name not in ("deeplab", "classifier")
    path.write_bytes(content)
    run = load_exported(str(path), format, num_threads=1)
    numbers = []
    for image in PICTURES:
        expected, given = predict(model, image), run(image)
        if detector:
            difference = compare_detections(expected, given)
            assert difference.unmatched == 0
            assert difference.box < 1e-3 and difference.score < 1e-5
            assert given[2].dtype == torch.int64
        else:
            torch.testing.assert_close(given[0], expected[0], rtol=0, atol=1e-4)
        numbers.append(len(given[0]))
    assert not detector or (min(numbers) == 0 and sorted(numbers)[1] > 0)


@pytest.mark.parametrize(
    "name", ["rfcn", "faster_rcnn", "category_aware_rpn", "deeplab", "classifier", "fpn"]
)
def test_torchscript(name, tmp_path):
    check(name, "torchscript", tmp_path / "model.ts")


@pytest.mark.parametrize("name", ["fpn", "category_aware_rpn", "deeplab"])
def test_torch_export(name, tmp_path):
    check(name, "torch-export", tmp_path / "model.pt2")


@needs_onnx
@pytest.mark.parametrize("name", ["rfcn", "faster_rcnn", "category_aware_rpn", "deeplab"])
def test_onnx(name, tmp_path):
    import onnx

    check(name, "onnx", tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {x.domain: x.version for x in model.opset_import} == {"": ONNX_OPSET}
    assert {node.domain for node in model.graph.node} == {""}
    operators = {node.op_type for node in model.graph.node}
    assert "DeformConv" in operators
    assert ("RoiAlign" in operators) == (name in ("rfcn", "faster_rcnn"))
    assert ("NonMaxSuppression" in operators) == (name != "deeplab")
    assert {x.key: x.value for x in model.metadata_props}.items() >= SETTINGS.items()
    (image,) = model.graph.input
    assert image.name == "image"
    assert [bool(x.dim_param) for x in image.type.tensor_type.shape.dim] == [False, True, True]


@needs_onnx
def test_onnx_of_a_feature_pyramid(tmp_path):
    """Its backbone alone: a whole detector on it takes half a minute to export."""
    import onnx

    _, model = build("fpn")
    network = build_exported(model, backbone_only=True)
    path = tmp_path / "model.onnx"
    path.write_bytes(export_network(network, "onnx"))
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert {"DeformConv", "Resize", "MaxPool"} <= operators
    run = load_exported(str(path), "onnx", num_threads=1)
    for image in PICTURES:
        with torch.no_grad():
            expected = network(image)
        # Values up to 14; random offsets make 3e-3 of rounding, as float64 tells.
        torch.testing.assert_close(run(image), expected, rtol=0, atol=5e-3)


def test_settings_lie_in_the_file(tmp_path):
    path = tmp_path / "model.ts"
    path.write_bytes(exported("classifier", "torchscript")[1])
    found = dict.fromkeys(SETTINGS, "")
    torch.jit.load(path, _extra_files=found)
    assert {key: value.decode() for key, value in found.items()} == SETTINGS


def test_unknown_format():
    _, model = build("classifier")
    with pytest.raises(ValueError, match="'caffe2' given, accepted are torch-export, torchscript"):
        export_network(build_exported(model), "caffe2")


def test_missing_package(monkeypatch):
    _, model = build("classifier")
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs onnx and onnxscript: pip install"):
        export_network(build_exported(model), "onnx")


def test_detections_are_compared_whatever_their_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 41]])
    first = (boxes, torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 2, 2]))
    order = torch.tensor([0, 2, 1])
    moved = (boxes[order] + 0.25, first[1][order] - 0.125, first[2][order])
    difference = compare_detections(first, moved)
    assert (difference.unmatched, difference.box, difference.score) == (0, 0.25, 0.125)
    other_class = (*first[:2], torch.tensor([0, 2, 2]))
    assert compare_detections(first, other_class).unmatched == 2
    nothing = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert compare_detections(first, nothing).unmatched == 3
    assert compare_detections(nothing, nothing).unmatched == 0


@needs_onnx
def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """It runs as it stands, with ONNX Runtime and OpenCV alone."""
    model, content = exported("category_aware_rpn", "onnx")
    (tmp_path / "model.onnx").write_bytes(content)
    shown = max(
        (image.round() for image in PICTURES), key=lambda image: len(predict(model, image)[0])
    )
    _, content = cv2.imencode(".png", shown.permute(1, 2, 0).numpy())  # JPEG would change it
    (tmp_path / "picture.jpg").write_bytes(content.tobytes())
    (code,) = (
        part.partition("```")[0]
        for part in DOCUMENT.read_text().split("```python\n")[1:]
        if "onnxruntime" in part
    )
    assert len(code.splitlines()) <= 20
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    result = runpy.run_path("example.py")
    found = [torch.from_numpy(result[name]) for name in ("boxes", "scores", "classes")]
    expected = predict(model, shown)
    difference = compare_detections(expected, found)
    assert len(found[0]) > 0 and difference.unmatched == 0 and difference.box < 1e-3
