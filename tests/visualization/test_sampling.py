"""Tracing of sampling locations and part bins against hand-made answers; what is drawn where."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import nn

from d2_deform.config import add_deform_config
from d2_deform.layers import DeformConv2d, DeformPSRoIPool
from d2_deform.modeling.backbone import AlignedInceptionResNet, build_deform_resnet_backbone
from d2_deform.modeling.roi_heads import DeformROIPooler
from d2_deform.visualization import (
    draw_part_bins,
    draw_sampling_points,
    part_bins,
    record_sampling,
    trace_sampling_locations,
)


class Detector(nn.Module):
    """A backbone of stride 4 and R-FCN's score pooling, called as Detectron2's detectors are."""

    def __init__(self, *layers, num_classes=2, offset_groups=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.AvgPool2d(4), *layers)
        self.roi_heads = nn.Module()
        self.roi_heads.num_classes = num_classes
        self.roi_heads.cls_pool = DeformPSRoIPool(
            2, 2, 0.25, in_channels=3, offset_groups=offset_groups
        )
        self.eval()

    def forward(self, inputs):
        feature = self.backbone(inputs[0]["image"][None])
        score = feature.new_zeros(1, (self.roi_heads.num_classes + 1) * 4, *feature.shape[-2:])
        rois = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]])
        return self.roi_heads.cls_pool(score, rois, feature)


def deform_conv(dilation=1, stride=1, **kwargs):
    return DeformConv2d(3, 3, 3, stride, dilation, dilation, **kwargs)


def build_deform_resnet_backbone_of(depth):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.DEFORM.NUM_LAYERS = 3
    return build_deform_resnet_backbone(cfg, ShapeSpec(channels=3))


def record_backbone(backbone):
    model = nn.Module()
    model.backbone = backbone
    with record_sampling(model.eval()) as recorded, torch.no_grad():
        backbone(torch.rand(1, 3, 64, 64))
    return recorded


IMAGE = torch.rand(3, 48, 64)


def grid(x, y, step, reach=1):
    steps = range(-reach, reach + 1)
    return {(x + i * step, y + j * step) for i in steps for j in steps}


def as_set(points):
    return {(round(float(x), 3), round(float(y), 3)) for x, y in points}


def test_zero_offsets_give_the_rigid_grid():
    points = trace_sampling_locations(Detector(deform_conv(dilation=2)), IMAGE, (30.0, 22.0))
    assert points.shape == (9, 2)
    assert as_set(points) == grid(30.0, 22.0, 2 * 4)


def test_three_layers_give_729_points():
    model = Detector(deform_conv(), deform_conv(), deform_conv())
    points = trace_sampling_locations(model, IMAGE, (30.0, 22.0))
    assert points.shape == (729, 2)
    assert as_set(points) == grid(30.0, 22.0, 4, reach=3)


def test_only_the_last_layers_are_followed():
    model = Detector(deform_conv(), deform_conv(), deform_conv())
    assert trace_sampling_locations(model, IMAGE, (30.0, 22.0), layers=1).shape == (9, 2)
    model = Detector(deform_conv())
    assert trace_sampling_locations(model, IMAGE, (30.0, 22.0), layers=3).shape == (9, 2)


def test_each_tap_takes_its_own_offset_though_others_leave_the_map():
    conv = deform_conv()
    bias = torch.zeros(9, 2)
    bias[8] = torch.tensor([0.5, 0.25])  # y, x of the last tap, in cells
    conv.conv_offset.bias.data.copy_(bias.flatten())
    points = trace_sampling_locations(Detector(conv), IMAGE, (2.0, 2.0))  # first cell
    assert points.shape == (9, 2)
    np.testing.assert_allclose(points[0], [-2.0, -2.0])  # outside, and kept
    np.testing.assert_allclose(points[8], [6.0 + 4 * 0.25, 6.0 + 4 * 0.5])


def test_offsets_between_cells_are_interpolated():
    first, last = deform_conv(), deform_conv()
    # The lower layer's offset grows with the picture, which grows along x; so does its mean.
    first.conv_offset.weight.data[1::2, 0, 1, 1] = 1.0
    nn.init.constant_(last.conv_offset.bias, 0.5)
    model = Detector(first, last)
    image = torch.zeros(3, 48, 64)
    image[0] = (torch.arange(64) // 4)[None] * 0.1  # cell x holds 0.1 * x
    points = trace_sampling_locations(model, image, (30.0, 22.0))
    cell_x, cell_y = 30 / 4 - 0.5, 22 / 4 - 0.5
    expected = set()
    for i in (-1, 0, 1):
        for k in (-1, 0, 1):
            x = cell_x + i + 0.5  # where the upper layer samples: between two cells
            expected.add(round(4 * (x + k + 0.1 * x + 0.5), 3))
    assert {x for x, _ in as_set(points)} == expected
    assert {y for _, y in as_set(points)} == {4 * (cell_y + 1 + j) for j in (-2, -1, 0, 1, 2)}


def test_strided_layer_between():
    model = Detector(deform_conv(), nn.AvgPool2d(1, stride=2), deform_conv())
    points = trace_sampling_locations(model, IMAGE, (28.0, 20.0))
    # Cell (3, 2) of stride 8 reads cell (6, 4) of stride 4, whose centre is (26, 18).
    assert as_set(points) == {
        (x + i, y + j) for x, y in grid(26.0, 18.0, 8) for i, j in grid(0, 0, 4)
    }


def test_aligned_inception_resnet_is_followed_through_its_longer_branch():
    backbone = AlignedInceptionResNet(2, res2_out_channels=16, stem_out_channels=8, res5_dilation=2)
    model = Detector()
    model.backbone = backbone.eval()
    model.forward = lambda inputs: model.backbone(inputs[0]["image"][None])
    for block in backbone.res5[1:]:
        nn.init.constant_(block.conv_a2.conv_offset.bias, 100.0)  # beside the branch
        nn.init.constant_(block.conv_b3.conv_offset.bias, 1.0)
    image = torch.rand(3, 96, 128)
    points = trace_sampling_locations(model, image, (56.0, 40.0), layers=4)
    assert points.shape == (9**4, 2)
    assert as_set(points) == grid(56.0 + 2 * 16, 40.0 + 2 * 16, 2 * 16, reach=4)


@pytest.mark.parametrize("cell", [(0, 0), (3, 5), (7, 11)])  # y, x: corners, too
def test_points_are_where_the_network_reads(cell):
    """The input cells that an output cell's gradient reaches are the neighbours of its points."""
    torch.manual_seed(1)
    conv = deform_conv(dilation=2)
    nn.init.normal_(conv.conv_offset.bias)
    nn.init.ones_(conv.weight)
    model = Detector()
    model.backbone = nn.Sequential(conv)
    feature = torch.rand(1, 3, 8, 12, requires_grad=True)
    with record_sampling(model) as recorded:
        output = model.backbone(feature)
    output[0, :, cell[0], cell[1]].sum().backward()
    reached = {tuple(place) for place in feature.grad[0].sum(0).nonzero().tolist()}
    points = recorded.trace((cell[1] + 0.5, cell[0] + 0.5))
    read = set()
    for x, y in points - 0.5:  # in cells
        read |= {(row, column) for row in _around(y) for column in _around(x)}
    assert reached == {place for place in read if 0 <= place[0] < 8 and 0 <= place[1] < 12}


def _around(value):
    return int(np.floor(value)), int(np.floor(value)) + 1


def test_group():
    conv = DeformConv2d(3, 3, 3, padding=1, deform_groups=3)
    conv.conv_offset.bias.data.view(3, 9, 2)[2] = 1.0
    model = Detector(conv)
    assert as_set(trace_sampling_locations(model, IMAGE, (30.0, 22.0))) == grid(30.0, 22.0, 4)
    points = trace_sampling_locations(model, IMAGE, (30.0, 22.0), group=2)
    assert as_set(points) == grid(34.0, 26.0, 4)
    with pytest.raises(ValueError, match="group: 3 given, accepted is 0 to 2"):
        trace_sampling_locations(model, IMAGE, (30.0, 22.0), group=3)


def test_offsets_that_are_not_finite_are_told():
    model = Detector(deform_conv())
    nn.init.constant_(model.backbone[1].conv_offset.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite; are the weights sound"):
        trace_sampling_locations(model, IMAGE, (30.0, 22.0))


def record(model, image=IMAGE):
    with record_sampling(model) as recorded, torch.no_grad():
        model([{"image": image}])
    return recorded


def test_pattern_without_offsets():
    last = deform_conv()
    nn.init.constant_(last.conv_offset.bias, 0.5)
    recorded = record(Detector(deform_conv(dilation=2), last))
    points = recorded.trace((30.0, 22.0), deformed=False)
    assert as_set(points) == grid(30.0, 22.0, 4, reach=3)


def test_effective_dilation():
    conv = deform_conv(dilation=2)
    recorded = record(Detector(conv))
    assert recorded.effective_dilation(recorded.fields[0], (30.0, 22.0)) == 2.0
    # The middle tap a cell to the right: its right neighbour is 1 away, its left one 3, the other
    # two sqrt(5).
    conv.conv_offset.bias.data.view(9, 2)[4, 1] = 1.0
    recorded = record(Detector(conv))
    expected = (8 * 2 + 1 + 3 + 2 * 5**0.5) / 12
    dilation = recorded.effective_dilation(recorded.fields[0], (30.0, 22.0))
    assert dilation == pytest.approx(expected)


def test_layers_are_named_as_in_the_paper():
    resnet = build_deform_resnet_backbone_of(50)
    assert [one.name for one in record_backbone(resnet).fields] == ["res5a", "res5b", "res5c"]
    resnet = build_deform_resnet_backbone_of(18)
    names = [one.name for one in record_backbone(resnet).fields]
    assert names == ["res5a conv2", "res5b conv1", "res5b conv2"]


def test_both_branches_on_demand():
    backbone = AlignedInceptionResNet(1, res2_out_channels=16, stem_out_channels=8)
    model = Detector()
    model.backbone = backbone.eval()
    for every_layer, names in (
        (False, ["res5c conv_b2", "res5c conv_b3"]),
        (True, ["res5c conv_a2", "res5c conv_b2", "res5c conv_b3"]),
    ):
        with record_sampling(model, every_layer) as recorded, torch.no_grad():
            backbone(torch.rand(1, 3, 64, 64))
        assert [one.name for one in recorded.fields] == names


def test_leaves_no_hook_behind():
    model = Detector(deform_conv())
    trace_sampling_locations(model, IMAGE, (30.0, 22.0))
    part_bins(model, IMAGE, torch.rand(1, 4), [0])
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_needs_a_deformable_model_in_evaluation_mode():
    with pytest.raises(ValueError, match="no deformable convolution to trace"):
        trace_sampling_locations(Detector(), IMAGE, (1.0, 1.0))
    with pytest.raises(ValueError, match="training mode"):
        trace_sampling_locations(Detector(deform_conv()).train(), IMAGE, (1.0, 1.0))
    model = Detector()
    model.roi_heads.cls_pool = DeformPSRoIPool(2, 2, 0.25)
    with pytest.raises(ValueError, match="no deformable RoI pooling"):
        part_bins(model, IMAGE, torch.rand(1, 4), [0])


def test_part_bins_at_rest():
    bins = part_bins(Detector(), IMAGE, torch.tensor([[8.0, 4.0, 28.0, 44.0]]), [1])
    assert bins.shape == (1, 2, 2, 4)
    assert bins[0, 0, 0].tolist() == [8, 4, 18, 24]
    assert bins[0, 0, 1].tolist() == [18, 4, 28, 24]
    assert bins[0, 1, 0].tolist() == [8, 24, 18, 44]


@pytest.mark.parametrize("offset_groups", [1, 3])
def test_part_bins_move_by_class(offset_groups):
    model = Detector(offset_groups=offset_groups)
    by_position = model.roi_heads.cls_pool.offset_conv.bias.data.view(offset_groups, 2, 2, 2)
    group = 1 if offset_groups == 3 else 0
    by_position[group, 0, 1, 0] = 2.0  # x of bin (1, 0): 0.2 of the width
    by_position[group, 1, 0, 1] = -1.0  # y of bin (0, 1)
    boxes = torch.tensor([[8.0, 4.0, 28.0, 44.0]] * 2)
    bins = part_bins(model, IMAGE, boxes, torch.tensor([0, 1]))
    rest = part_bins(Detector(), IMAGE, boxes, [0, 1])
    moved = torch.zeros(2, 2, 2, 4)
    moved[1, 1, 0] = torch.tensor([4.0, 0.0, 4.0, 0.0])
    moved[1, 0, 1] = torch.tensor([0.0, -4.0, 0.0, -4.0])
    if offset_groups == 1:
        moved[0] = moved[1]
    torch.testing.assert_close(bins - rest, moved)


def test_part_bins_of_faster_rcnn():
    """Two levels, each with offsets of its own; those move the bins of every class."""
    pooler = DeformROIPooler(2, [1 / 4, 1 / 8], 2, 3, canonical_box_size=16, canonical_level=2)
    for level, shift in enumerate((2.0, -1.0)):  # 0.2 and -0.1 of the box
        pooler.level_poolers[level].offset_fc.bias.data.view(2, 2, 2)[0, 1, 0] = shift
    model = Detector()
    model.roi_heads = nn.Module()
    model.roi_heads.box_pooler = pooler

    def forward(inputs):
        first = model.backbone(inputs[0]["image"][None])
        return pooler([first, nn.functional.avg_pool2d(first, 2)], [Boxes(boxes)])

    model.forward = forward
    boxes = torch.tensor([[8.0, 4.0, 18.0, 14.0], [0.0, 0.0, 40.0, 40.0], [9.0, 5.0, 19.0, 15.0]])
    bins = part_bins(model.eval(), IMAGE, boxes, [0, 1, 1])
    assert bins.shape == (3, 2, 2, 4)
    assert bins[0, 0, 1].tolist() == [13, 4, 18, 9]
    torch.testing.assert_close(bins[0, 1, 0], torch.tensor([10.0, 9.0, 15.0, 14.0]))
    torch.testing.assert_close(bins[1, 1, 0], torch.tensor([-4.0, 20.0, 16.0, 40.0]))
    torch.testing.assert_close(bins[2] - bins[0], torch.ones(2, 2, 4))
    at_rest = record(model).part_bins(boxes, [0, 1, 1], deformed=False)
    assert at_rest[1, 1, 0].tolist() == [0, 20, 20, 40]


def test_no_box():
    assert part_bins(Detector(), IMAGE, torch.zeros(0, 4), []).shape == (0, 2, 2, 4)


def red(picture):
    return (picture[..., 0] > 150) & (picture[..., 1] < 100)


def test_points_are_drawn_where_they_are():
    image = np.zeros((40, 60, 3), np.uint8)
    points = np.array([[10.5, 20.5], [-5.0, 3.0], [900.0, 3.0]])
    drawn = draw_sampling_points(image, points, (40.5, 30.5), scale=4)
    assert drawn.shape == (160, 240, 3) and not image.any()
    ys, xs = np.nonzero(red(drawn))
    assert abs(xs.mean() + 0.5 - 42) < 1 and abs(ys.mean() + 0.5 - 82) < 1
    assert drawn[122, 162].tolist() == [40, 230, 90]


def test_bins_are_drawn_where_they_are():
    image = np.zeros((40, 60, 3), np.uint8)
    bins = np.array([[[[12.0, 8.0, 20.0, 18.0]]]])
    drawn = draw_part_bins(image, np.array([[10.0, 5.0, 50.0, 35.0]]), bins, scale=2)
    assert red(drawn)[16, 30] and red(drawn)[30, 24] and not red(drawn)[26, 32]
    assert drawn[10, 80, 2] > 200  # the RoI's upper edge, blue


def test_outline_is_the_hull_of_all_points():
    image = np.zeros((40, 60, 3), np.uint8)
    points = np.array([[10.0, 5.0], [50.0, 5.0], [50.0, 35.0], [10.0, 35.0], [30.0, 20.0]])
    drawn = draw_sampling_points(image, points, (30.0, 20.0), scale=4, outline=True)
    edge = drawn[18:22, 120].max(axis=0)
    assert edge[0] > 100 and edge[1] > 90 and edge[2] < 60
    assert drawn[80, 60].max() == 0
