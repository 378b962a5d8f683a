"""Figures: which rows and panels they have, where a detection's window lies."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_deform.layers import DeformConv2d
from d2_deform.visualization import (
    SampledPrediction,
    SamplingRecord,
    draw_offset_figure,
    record_sampling,
)
from d2_deform.visualization import figure as figures


@pytest.fixture
def panels(monkeypatch):
    """What is put together, instead of the picture of it."""
    monkeypatch.setattr(figures, "arrange_panels", lambda rows: rows)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.AvgPool2d(4), DeformConv2d(3, 3, 3, padding=1))


def predict(network, boxes=(), scores=()):
    with record_sampling(network.eval()) as record, torch.no_grad():
        network.backbone(torch.rand(1, 3, 48, 64))
    found = Instances((96, 128))
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    image = np.zeros((96, 128, 3), np.uint8)
    return SampledPrediction(image, {"instances": found}, record, (0.5, 0.5))


def test_a_row_for_each_location(panels):
    rows = draw_offset_figure(predict(Network()), [(60.0, 44.0), (4.0, 4.0)])
    assert len(rows) == 2
    plain, deformable = rows[1]
    name = "backbone.1.conv_offset".removeprefix("backbone.")
    assert (
        plain == f"without offsets: 9 points over 16 x 16 pixels, 5 outside\ndilation: {name}\xa01"
    )
    assert deformable.endswith(f"effective dilation: {name}\xa01.0")
    assert all(panel.shape == (360, 480, 3) for panel in rows[0].values())


def test_without_location_the_best_detection(panels, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures, "_draw_location", lambda _, location, *args: drawn.append(location)
    )
    boxes = [[0.0, 0.0, 20.0, 20.0], [40.0, 20.0, 60.0, 80.0]]
    draw_offset_figure(predict(Network(), boxes, [0.6, 0.9]))
    draw_offset_figure(predict(Network(), boxes, [0.6, 0.9]), confidence_threshold=0.95)
    assert drawn == [(50.0, 50.0), (64.0, 48.0)]


def test_detections_in_order_of_confidence(panels, monkeypatch):
    monkeypatch.setattr(SampledPrediction, "has_part_bins", True)
    monkeypatch.setattr(
        SampledPrediction,
        "part_bins",
        lambda self, detection, deformed=True: detection.pred_boxes.tensor.view(1, 1, 1, 4),
    )
    boxes = [[0.0, 0.0, 20.0, 20.0], [40.0, 20.0, 60.0, 80.0]]
    rows = draw_offset_figure(predict(Network(), boxes, [0.6, 0.9]), num_detections=5)
    assert [list(row)[1] for row in rows[1:]] == [
        "deformable: 1 x 1 bins of 0: 90%",
        "deformable: 1 x 1 bins of 0: 60%",
    ]
    window = rows[2]["deformable: 1 x 1 bins of 0: 60%"]  # 30 x 30 pixels, enlarged 16 times
    assert window.shape == (480, 480, 3)
    assert window[160, 318:322].max() > 200 and window[400].max() == 0  # the box's right edge


def test_nothing_to_draw():
    prediction = predict(Network())
    prediction.record = SamplingRecord(prediction.record.model)
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_offset_figure(prediction)


@pytest.mark.parametrize(
    "box, window",
    [
        ([40, 20, 60, 50], (20, 5, 80, 65)),
        ([0, 0, 4, 4], (0, 0, 18, 18)),  # a tiny one has more around it
        ([100, 60, 128, 96], (78, 42, 128, 96)),
    ],
)
def test_window_around_a_detection(box, window):
    image = np.zeros((96, 128, 3), np.uint8)
    assert figures._surroundings(np.array(box, dtype=np.float32), image) == window


def test_rows_are_below_each_other_and_long_titles_are_broken():
    red = np.full((40, 480, 3), (255, 0, 0), np.uint8)
    blue = np.full((60, 480, 3), (0, 0, 255), np.uint8)
    picture = figures.arrange_panels([{"a": red, "b": red}, {"word " * 30: blue}])
    assert picture.shape[1] == 2 * 480 + 3 * 12
    for colour, panel_height, columns in ((red, 40, 960), (blue, 60, 480)):
        rows, found = np.nonzero((picture == colour[0, 0]).all(axis=2))
        assert rows.max() - rows.min() + 1 == panel_height
        assert len(found) == panel_height * columns
