"""The explorer's page: what it holds, its tracing against Python's, its use in a browser.

The tracing in JavaScript runs in node, the page in headless Chromium through Playwright's Python
package; where one of them is missing, its tests are skipped and say so.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

import d2_deform.visualization
from d2_deform.layers import DeformConv2d
from d2_deform.visualization import SampledPrediction, build_explorer_page, record_sampling

FOLDER = os.path.dirname(d2_deform.visualization.__file__)
SCRIPT = os.path.join(FOLDER, "explorer.js")
NODE = shutil.which("node") or shutil.which("nodejs")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOCATIONS = [(30.0, 22.0), (0.0, 0.0), (96.0, 72.0), (2.5, 70.25), (95.0, 1.0)]  # corners, too
RATIO = (64 / 96, 48 / 72)  # the network sees 64 x 48 pixels of a picture of 96 x 72


class Network(nn.Module):
    """Strides of 4 and 2 before, between and within its three deformable layers; two groups."""

    def __init__(self):
        super().__init__()

        def conv(stride=1, dilation=1):
            layer = DeformConv2d(4, 4, 3, stride, dilation, dilation, deform_groups=2)
            nn.init.normal_(layer.conv_offset.weight, std=0.3)
            nn.init.normal_(layer.conv_offset.bias, std=0.8)
            return layer

        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 4, 1), conv(dilation=2), nn.AvgPool2d(1, 2), conv(stride=2)),
            *(conv(dilation=2),),
        )


def predict(network, detections=True):
    with record_sampling(network.eval()) as record, torch.no_grad():
        network.backbone(torch.rand(1, 3, 48, 64))
    image = np.full((72, 96, 3), 128, np.uint8)
    found = Instances((72, 96))
    boxes = [[10.0, 20.0, 50.0, 60.0], [0.0, 0.0, 30.0, 40.0]]
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores = torch.tensor([0.9, 0.6])
    found.pred_classes = torch.tensor([1, 0])
    outputs = {"instances": found} if detections else {}
    return SampledPrediction(image, outputs, record, RATIO, ["cat", "<dog>"])


@pytest.fixture(scope="module")
def prediction():
    torch.manual_seed(0)
    return predict(Network())


def alone(prediction, at):
    """The prediction with one of its layers only."""
    record = replace(prediction.record, fields=[prediction.record.fields[at]])
    return replace(prediction, record=record)


def read_data(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def decode(layer):
    raw = np.frombuffer(base64.b64decode(layer["offsets"]), {1: "<i1", 2: "<i2"}[layer["bytes"]])
    shape = (layer["groups"], layer["kernel"][0] * layer["kernel"][1], 2, *layer["outputSize"])
    return raw.reshape(shape) * layer["scale"]


def test_page_is_whole_and_loads_nothing(prediction):
    page = build_explorer_page({"</script><b>.jpg": prediction}, title="A & <B>")
    assert "{{" not in page and "</script><b>" not in page
    assert "<title>A &amp; &lt;B></title>" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page
    (picture,) = read_data(page)["pictures"]
    assert picture["name"] == "</script><b>.jpg"
    assert (picture["width"], picture["height"]) == (96, 72)
    assert [one["label"] for one in picture["detections"]] == ["<dog>: 90%", "cat: 60%"]
    assert picture["detections"][0]["box"] == [10, 20, 50, 60]
    assert picture["start"] == [30, 40]


@pytest.mark.parametrize("limit, parts", [(2**21, 2 * 32767), (0, 2 * 127)])
def test_offsets_are_quantised(prediction, monkeypatch, limit, parts):
    monkeypatch.setattr("d2_deform.visualization.explorer.MAX_OFFSET_BYTES", limit)
    layers = read_data(build_explorer_page({"a": prediction}))["pictures"][0]["layers"]
    assert len(layers) == 3
    for layer, field in zip(layers, prediction.record.fields, strict=True):
        offset = field.offset.numpy()
        error = np.abs(decode(layer) - offset).max()
        assert error <= np.abs(offset).max() / parts * 1.01


def test_only_the_last_layers(prediction):
    layers = read_data(build_explorer_page({"a": prediction}, layers=1))["pictures"][0]["layers"]
    assert [layer["name"] for layer in layers] == [prediction.record.fields[-1].name]


def test_part_bins_are_those_of_pooling(prediction, monkeypatch):
    bins = torch.arange(2 * 2 * 2 * 4.0).view(2, 2, 2, 4)
    monkeypatch.setattr(SampledPrediction, "has_part_bins", True)
    monkeypatch.setattr(
        SampledPrediction, "part_bins", lambda self, found, deformed=True: bins + 100 * deformed
    )
    first, second = read_data(build_explorer_page({"a": prediction}))["pictures"][0]["detections"]
    assert first["binShape"] == [2, 2]
    assert first["binsAtRest"] == list(range(16)) and second["bins"] == list(range(116, 132))


def test_network_without_deformable_convolution():
    prediction = predict(nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 1)}), detections=False)
    (picture,) = read_data(build_explorer_page({"a": prediction}))["pictures"]
    assert picture["layers"] == [] and picture["detections"] == []
    assert picture["start"] == [48, 36]


def test_offsets_that_are_not_finite_are_told():
    network = Network()
    nn.init.constant_(network.backbone[1].conv_offset.bias, float("inf"))
    with pytest.raises(ValueError, match="not finite; are the weights sound"):
        build_explorer_page({"a": predict(network)})


@pytest.mark.skipif(NODE is None, reason="node, which runs the page's script, is not installed")
def test_script_traces_as_python(prediction):
    page = build_explorer_page({"a": prediction})
    program = f"""
const explorer = require({json.dumps(SCRIPT)});
const picture = JSON.parse(require("fs").readFileSync(0)).pictures[0];
const answers = [];
for (const location of {json.dumps(LOCATIONS)}) for (const group of [0, 1]) answers.push({{
  together: [false, true].map((d) => explorer.trace(picture, picture.layers, location, group, d)),
  alone: picture.layers.map((one) => explorer.trace(picture, [one], location, group, true)),
  dilation: picture.layers.map((one) => explorer.effectiveDilation(picture, one, location, group)),
}});
console.log(JSON.stringify(answers));
"""
    data = json.dumps(read_data(page))
    told = subprocess.run(
        [NODE, "-e", program], input=data, capture_output=True, text=True, check=True
    ).stdout
    answers = iter(json.loads(told))
    for location in LOCATIONS:
        for group in (0, 1):
            answer = next(answers)
            for deformed, points in zip((False, True), answer["together"], strict=True):
                expected = prediction.trace(location, 3, group, deformed)
                assert expected.shape == (729, 2)
                np.testing.assert_allclose(points, expected, atol=0.02)  # pixels
            for at, field in enumerate(prediction.record.fields):
                expected = alone(prediction, at).trace(location, 1, group)
                np.testing.assert_allclose(answer["alone"][at], expected, atol=0.005)
                expected = prediction.effective_dilation(field, location, group)
                assert answer["dilation"][at] == pytest.approx(expected, abs=1e-3)


@pytest.mark.skipif(NODE is None, reason="node, which runs the page's script, is not installed")
def test_hull():
    program = f"""
const {{ convexHull }} = require({json.dumps(SCRIPT)});
console.log(JSON.stringify(convexHull([[1, 1], [0, 0], [2, 0], [1, 0], [2, 2], [0, 2], [0, 0]])));
"""
    hull = json.loads(subprocess.check_output([NODE, "-e", program], text=True))
    assert sorted(hull) == [[0, 0], [0, 2], [2, 0], [2, 2]]


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def drawn(page, name):
    return np.array(page.evaluate(f"explorer.drawn.{name}"))


def is_red(page, name, points, width=96):
    """Whether a canvas is red at points, which are in pixels of the picture."""
    colours = page.evaluate(
        """([name, points, width]) => {
          const canvas = document.getElementById(name), context = canvas.getContext("2d");
          const at = (value) => Math.round(value * canvas.width / width - 0.5);
          return points.map(([x, y]) => [...context.getImageData(at(x), at(y), 1, 1).data]);
        }""",
        [name, np.asarray(points).tolist(), width],
    )
    return [red > 150 and green < 90 and blue < 100 for red, green, blue, _ in colours]


def test_in_a_browser(browser, prediction, tmp_path):
    path = tmp_path / "explorer.html"
    path.write_text(build_explorer_page({"a.jpg": prediction, "b.jpg": prediction}))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#table tr")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # on a phone

    # It starts in the middle of the most confident detection.
    np.testing.assert_allclose(drawn(page, "deformable"), prediction.trace((30, 40)), atol=0.02)
    assert page.locator("#detection").input_value() == "0"

    # A click: the points are the tensor's, and are to be seen where they are.
    page.locator("#detection").select_option("none")
    page.get_by_label("1.conv_offset alone").check()
    scale = page.locator("#deformable").bounding_box()["width"] / 96
    page.locator("#deformable").click(position={"x": 60 * scale, "y": 33 * scale})
    location = page.evaluate("explorer.state.location")
    np.testing.assert_allclose(location, [60, 33], atol=0.5)
    for name, deformed in (("plain", False), ("deformable", True)):
        expected = alone(prediction, 0).trace(tuple(location), 1, 0, deformed)
        np.testing.assert_allclose(drawn(page, name), expected, atol=0.02)
        visible = [
            (x, y)
            for x, y in expected
            if 1 < x < 95 and 1 < y < 71 and max(abs(x - location[0]), abs(y - location[1])) > 4
        ]
        assert len(visible) >= 3 and all(is_red(page, name, visible))

    # Keys: a cell of the last map, 16 of the network's pixels, 24 of the picture's; a pixel.
    page.get_by_label("all layers together").check()
    page.locator("#plain").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    moved = page.evaluate("explorer.state.location")
    np.testing.assert_allclose(moved, [location[0] - 24, location[1] + 1], atol=1e-9)
    page.get_by_label("Deformable group").select_option("1")
    expected = prediction.trace(tuple(moved), 3, 1)
    np.testing.assert_allclose(drawn(page, "deformable"), expected, atol=0.02)

    # Numbers, beyond the border too; detections by key; the other picture.
    page.get_by_label("x", exact=True).fill("500")
    assert page.evaluate("explorer.state.location")[0] == 96
    page.locator("#deformable").focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("PageDown")
    assert page.evaluate("explorer.state.location") == [15, 20]
    rows = page.locator("#table tr").all_inner_texts()
    assert len(rows) == 4 and rows[-1].startswith("together")
    assert page.locator("#summary").inner_text().startswith("Location 15, 20: 729 points")
    page.get_by_label("Picture").select_option("1")
    assert page.evaluate("explorer.state.picture") == 1
    assert problems == []
    assert requests == [path.as_uri()]
