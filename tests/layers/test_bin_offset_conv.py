"""BinOffsetConv2d: the order of convolution and pooling changes nothing but rounding."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from d2_deform.layers import bin_offset_conv
from d2_deform.layers.bin_offset_conv import BinOffsetConv2d
from d2_deform.ops import reference

ROIS = torch.tensor(
    [
        [0, 8.0, 16, 80, 100],
        [1, 30, 10, 90, 40],
        [0, -60, -50, 70, 60],  # some bins hold no sample
        [1, 500, 500, 600, 600],  # none does
        [0, 90, 90, 20, 30],  # inverted
        [2, 0, 0, 50, 50],  # no such picture
    ],
    dtype=torch.float64,
)
SCALE = 1 / 8


def make(in_channels=5, offset_groups=3, output_size=(3, 3), aligned=True):
    torch.manual_seed(0)
    layer = BinOffsetConv2d(in_channels, offset_groups, 3, output_size, SCALE, 2, aligned).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(2, in_channels, 11, 14, dtype=torch.float64)


def by_reference(layer, feature):
    fields = conv2d(feature, layer.weight, layer.bias)
    rule = (layer.output_size, 3, SCALE, 2)
    return reference.deform_ps_roi_pool(fields, ROIS, None, *rule, aligned=layer.aligned)


def pools_first(layer, *inputs):
    with mock.patch.object(bin_offset_conv, "deform_roi_pool", side_effect=RuntimeError("first")):
        try:
            layer(*inputs)
        except RuntimeError as error:
            assert str(error) == "first"
            return True
    return False


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_convolution_then_pooling(aligned, channels_last):
    layer, feature = make(aligned=aligned)
    if channels_last:
        feature = feature.contiguous(memory_format=torch.channels_last)
    feature.requires_grad_()
    assert pools_first(layer, feature, ROIS)
    offset, expected = layer(feature, ROIS), by_reference(layer, feature)
    torch.testing.assert_close(offset, expected)
    assert not offset[3].any() and not offset[5].any()  # no bias where nothing is sampled

    upstream = torch.randn_like(expected)
    inputs = (feature, layer.weight, layer.bias)
    gradients = torch.autograd.grad(offset, inputs, upstream)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    "kwargs",
    [{"in_channels": 60}, {"output_size": (6, 3)}, {"output_size": (2, 2)}],
    ids=["small fields", "more bins than positions", "fewer bins"],
)
def test_convolves_first_where_that_is_less_or_bins_share_positions(kwargs):
    layer, feature = make(**kwargs)
    assert not pools_first(layer, feature, ROIS)
    torch.testing.assert_close(layer(feature, ROIS), by_reference(layer, feature))


def test_part_of_the_boxes_at_a_time_where_nothing_learns(monkeypatch):
    monkeypatch.setattr(bin_offset_conv, "ROIS_AT_ONCE", 4)
    layer, feature = make()
    with torch.no_grad():
        torch.testing.assert_close(layer(feature, ROIS), by_reference(layer, feature))
        assert layer(feature, ROIS[:0]).shape == (0, 6, 3, 3)


def test_no_box():
    layer, feature = make()
    feature.requires_grad_()
    offset = layer(feature, ROIS[:0])
    assert offset.shape == (0, 6, 3, 3)
    offset.sum().backward()
    assert not feature.grad.any() and not layer.weight.grad.any()


def test_without_bias():
    layer, feature = make()
    layer.bias = None
    torch.testing.assert_close(layer(feature, ROIS), by_reference(layer, feature))


def test_one_bad_number_moves_what_samples_it():
    layer, feature = make()
    feature[0, 2, 10, 13] = float("nan")
    offset, expected = layer(feature, ROIS), by_reference(layer, feature)
    assert torch.equal(offset.isnan(), expected.isnan())


def test_traced_and_exported_programs_convolve_first():
    layer, feature = make()
    inputs = feature, ROIS
    traced = torch.jit.trace(layer, inputs, check_trace=False)
    program = torch.export.export(layer, inputs)
    for graph in (str(traced.inlined_graph), str(program.graph)):
        assert "deform_ps_roi_pool" in graph and "deform_roi_pool" not in graph
    torch.testing.assert_close(traced(*inputs), layer(*inputs))


def test_compiles_in_one_graph_for_any_number_of_boxes():
    layer, feature = make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (6, 3, 2):
        torch.testing.assert_close(compiled(feature, ROIS[:count]), layer(feature, ROIS[:count]))


def test_feature_of_other_channels_is_refused():
    layer, feature = make()
    with pytest.raises(RuntimeError, match="to have 5 channels, but got 4 channels"):
        layer(feature[:, :4], ROIS)
