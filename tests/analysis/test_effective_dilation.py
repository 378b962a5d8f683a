"""Effective dilation against hand-made answers; undeformed filters have their own dilation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from d2_deform.analysis import (
    FILTER_CLASSES,
    LayerDilation,
    dilation_table,
    dilations_as_dict,
    draw_dilation_histograms,
    measure_effective_dilation,
    summarize_dilations,
)
from d2_deform.analysis.effective_dilation import (
    Distribution,
    classify_filters,
    effective_dilation,
    filter_centres,
)
from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d, OffsetConv2d
from d2_deform.modeling.backbone import AlignedInceptionResNet


class Network(nn.Module):
    """A backbone behind a map of stride 4, called as Detectron2's models are."""

    def __init__(self, *layers):
        super().__init__()
        self.backbone = nn.Sequential(nn.AvgPool2d(4), *layers)

    def forward(self, inputs):
        return self.backbone(inputs[0]["image"][None])


def picture(boxes=(), is_crowd=None, size=(64, 64), resized=None):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    crowd = torch.zeros(len(boxes)) if is_crowd is None else torch.tensor(is_crowd)
    image = torch.rand(3, *(resized or size))
    target = {"boxes": boxes, "is_crowd": crowd.bool()}
    return [{"image": image, "height": size[0], "width": size[1], **target}]


# Each class has filters: 8 x 8, 40 x 40 and 100 x 100 pixels, and what is around
BOXES = [[4.0, 4.0, 12.0, 12.0], [20.0, 4.0, 60.0, 44.0], [80.0, 20.0, 180.0, 120.0]]


@pytest.mark.parametrize("layer_class", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize("deform_groups", [1, 3])
def test_undeformed_filters_of_dilation_2_have_exactly_2(layer_class, deform_groups):
    layers = [
        layer_class(3, 3, 3, stride, 2, 2, deform_groups=deform_groups) for stride in (1, 2, 1)
    ]
    measured = measure_effective_dilation(
        Network(*layers), [picture(BOXES, size=(128, 192)), picture(BOXES, size=(150, 190))]
    )
    assert len(measured) == 3
    for layer in measured.values():
        assert layer.dilation == (2, 2)
        assert tuple(layer.by_class) == FILTER_CLASSES
        for values in layer.by_class.values():
            assert values.count > 0
            assert (values.mean, values.std) == (2.0, 0.0)
    assert summarize_dilations(measured).endswith(
        ": small 2.00, medium 2.00, large 2.00, background 2.00 (undeformed 2)"
    )


@pytest.mark.parametrize("dilation", [1, 3, 8])
def test_one_moved_tap(dilation):
    offset = torch.zeros(1, 9, 2, 4, 5)
    offset[0, 4, 1] = 1.0  # the middle tap, one cell to the right
    expected = (8 * dilation + (dilation + 1) + (dilation - 1) + 2 * math.hypot(dilation, 1)) / 12
    found = effective_dilation(offset, (3, 3), (dilation, dilation))
    assert found.shape == (4, 5) and found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full((4, 5), expected, dtype=torch.float64))


def test_a_filter_that_moves_as_a_whole_keeps_its_dilation():
    offset = torch.full((2, 9, 2, 1, 1), -7.5)
    assert effective_dilation(offset, (3, 3), (2, 2)).item() == 2.0


def test_the_mean_runs_over_groups():
    offset = torch.zeros(2, 9, 2, 1, 1)
    offset[1].view(3, 3, 2)[..., 0] = torch.tensor([[-3.0], [0.0], [3.0]])  # 3 rows further apart
    assert effective_dilation(offset, (3, 3), (2, 2)).item() == (2 + (2 + 5) / 2) / 2


def test_other_kernels():
    assert effective_dilation(torch.zeros(1, 3, 2, 1, 1), (1, 3), (5, 4)).item() == 4.0
    assert effective_dilation(torch.zeros(1, 4, 2, 1, 1), (2, 2), (5, 4)).item() == 4.5
    with pytest.raises(ValueError, match=r"kernel_size: \(1, 1\) given"):
        effective_dilation(torch.zeros(1, 1, 2, 1, 1), (1, 1), (1, 1))


def test_filter_centres():
    layer = OffsetConv2d(1, 3, stride=(1, 2), padding=2, dilation=2)
    # Maps of 600 x 1000 pixels: a stride of 16, sizes rounded up
    y, x = filter_centres(layer, (38, 32), (38, 63), (600, 1000))
    assert y[:2].tolist() == [8.0, 24.0] and x[:2].tolist() == [8.0, 40.0]
    y, x = filter_centres(OffsetConv2d(1, 3), (6, 6), (8, 8), (8, 8))  # no padding
    assert y.tolist() == x.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]


def classify(points, boxes, is_crowd=None, size=(500, 500), **kwargs):
    """Names of the classes of (x, y) points."""
    boxes = torch.tensor(boxes).reshape(-1, 4)
    is_crowd = torch.tensor(is_crowd if is_crowd else [False] * len(boxes)).bool()
    x, y = torch.tensor(points, dtype=torch.float64).T
    classes = classify_filters(y, x, size, boxes, is_crowd, **kwargs).diagonal()
    return [("left out", *FILTER_CLASSES)[place + 1] for place in classes.tolist()]


def test_sizes_are_coco_s():
    boxes = [[0.0, 0.0, 32.0, 31.9], [100.0, 0.0, 132.0, 32.0], [200.0, 0.0, 296.0, 96.0]]
    points = [(5, 5), (105, 5), (205, 5), (50, 50)]
    assert classify(points, boxes) == ["small", "medium", "large", "background"]
    assert classify(points, boxes, size_limits=(8, 32)) == [
        *("medium", "large", "large", "background")
    ]
    assert classify(points, []) == ["background"] * 4


def test_the_smallest_box_counts():
    boxes = [[0.0, 0.0, 200.0, 200.0], [10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 50.0, 50.0]]
    points = [(15, 15), (25, 25), (100, 100), (20, 15)]  # the last one: on a right edge
    assert classify(points, boxes) == ["small", "medium", "large", "medium"]


def test_what_is_left_out():
    boxes = [[0.0, 0.0, 200.0, 200.0], [10.0, 10.0, 20.0, 20.0]]
    points = [(15, 15), (100, 100), (300, 300), (500, 100), (100, -1)]
    assert classify(points, boxes, [True, False]) == [
        *("small", "left out", "background", "left out", "left out")
    ]


def test_sizes_and_places_are_of_the_original_picture():
    # 48 x 48 pixels in a picture of 64 x 64, shown to the network as 128 x 192
    layers = measure_effective_dilation(
        Network(DeformConv2d(3, 3, 3, padding=1)),
        [picture([[0.0, 0.0, 48.0, 48.0]], resized=(128, 192))],
    )
    counts = {name: values.count for name, values in layers["1.conv_offset"].by_class.items()}
    assert counts == {"small": 0, "medium": 24 * 36, "large": 0, "background": 32 * 48 - 24 * 36}


def test_classes_keep_apart():
    layer = DeformConv2d(3, 3, 3, padding=1)
    with torch.no_grad():  # every column of taps moves by its number times the brightness
        weight = layer.conv_offset.weight.view(3, 3, 2, 3, 3, 3)
        weight[:, :, 1, 0, 1, 1] = torch.tensor([0.0, 1.0, 2.0])
    inputs = picture([[0.0, 0.0, 16.0, 32.0]])
    inputs[0]["image"] = torch.zeros(3, 64, 64)
    inputs[0]["image"][:, :32, :16] = 4.0
    (measured,) = measure_effective_dilation(Network(layer), [inputs]).values()
    small, background = measured.by_class["small"], measured.by_class["background"]
    assert (small.count, small.mean, small.std) == (4 * 8, (1 + 5) / 2, 0.0)
    assert (background.count, background.mean, background.std) == (16 * 16 - 4 * 8, 1.0, 0.0)


def test_factors_of_modulated_filters_do_not_count():
    layer = ModulatedDeformConv2d(3, 3, 3, padding=1)
    nn.init.constant_(layer.conv_offset.bias[18:], -50.0)  # no tap has any weight
    (measured,) = measure_effective_dilation(Network(layer), [picture()]).values()
    assert measured.by_class["background"].mean == 1.0


def test_aligned_inception_resnet_has_three_layers_a_block():
    network = Network()
    network.backbone = AlignedInceptionResNet(
        1, res2_out_channels=16, stem_out_channels=8, res5_dilation=2
    )
    nn.init.constant_(network.backbone.res5[2].conv_a2.conv_offset.bias[1::18], 3.0)
    measured = measure_effective_dilation(network, [picture(size=(64, 96))])
    assert list(measured) == ["res5c conv_a2", "res5c conv_b2", "res5c conv_b3"]
    means = [layer.by_class["background"].mean for layer in measured.values()]
    moved = (10 * 2 + 1 + math.hypot(2, 3)) / 12  # the first tap, to the right
    assert means == [pytest.approx(moved), 2.0, 2.0]


def test_distribution():
    values = Distribution()
    assert math.isnan(values.mean) and math.isnan(values.std)
    values.add(torch.tensor([1.0, 2.0]))
    values.add(torch.tensor([[2.05], [5000.0]]))
    values.add(torch.tensor([]))
    expected = np.array([1.0, 2.0, 2.05, 5000.0])
    assert values.count == 4
    assert values.mean == pytest.approx(expected.mean()) and values.std == pytest.approx(
        expected.std()
    )
    assert {
        int(place): int(values.histogram[place]) for place in np.nonzero(values.histogram)[0]
    } == {8: 1, 16: 2, len(values.histogram) - 1: 1}


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match=r"no deformable convolution \(MODEL.DEFORM.NUM_LAYERS"):
        measure_effective_dilation(Network(nn.Conv2d(3, 3, 3)), [picture()])
    layer = DeformConv2d(3, 3, 3)
    nn.init.constant_(layer.conv_offset.bias, math.inf)
    with pytest.raises(ValueError, match=r"offsets of .* are not finite"):
        measure_effective_dilation(Network(layer), [picture()])


def layers_of(**by_layer):
    layers = {}
    for name, classes in by_layer.items():
        layers[name] = LayerDilation((2, 2))
        for class_name, values in classes.items():
            layers[name].by_class[class_name].add(torch.tensor(values))
    return layers


def test_report():
    layers = layers_of(
        res5b={"small": [2.0, 3.0], "background": [2.0] * 1200},
        res5c={"large": [4.25], "background": [1.0]},
    )
    table = dilation_table(layers).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0][:6] == ["layer", "dilation", *FILTER_CLASSES]
    assert cells[2] == ["res5c", "2", "", "", "4.25 ± 0.00", "1.00 ± 0.00", "0 / 0 / 1 / 1"]
    assert cells[3][:3] == ["res5b", "2", "2.50 ± 0.50"]
    assert cells[3][-1] == "2 / 0 / 0 / 1,200"
    assert summarize_dilations(layers) == (
        "2 deformable layers; res5c: large 4.25, background 1.00 (undeformed 2)"
    )
    values = dilations_as_dict(layers)["layers"]["res5b"]["by_class"]
    assert values["medium"] == {"filters": 0, "mean": None, "std": None, "histogram": []}
    assert values["small"]["histogram"][16] == values["small"]["histogram"][24] == 1


@pytest.mark.parametrize("number", [1, 5])
def test_figure(number):
    layers = layers_of(**{f"res{i}": {"small": [2.0, 3.0], "large": [9.0]} for i in range(number)})
    figure = draw_dilation_histograms(layers, "a network")
    assert figure.dtype == np.uint8 and figure.ndim == 3
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 10
