"""Under autocast features are of the half type, offsets of the weights': float32."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from d2_deform.layers import DeformPSRoIPool, DeformRoIPool, ModulatedDeformConv2d
from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ROIS = torch.tensor([[0, 8.0, 16, 80, 100], [1, 30, 10, 90, 40]])
POOLING = {"output_size": 3, "spatial_scale": 1 / 8, "sampling_ratio": 2}


@HALF
@pytest.mark.parametrize("features_are_half", [False, True])
def test_convolution(dtype, features_are_half):
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    nn.init.normal_(layer.conv_offset.weight)
    x = torch.rand(2, 4, 9, 8)
    if features_are_half:
        x = x.to(dtype)
    with torch.no_grad():
        offset, mask = layer.conv_offset.split(layer.conv_offset(x.float()))
        half = [t.to(dtype) for t in (x, layer.weight, layer.bias)]
        expected = deform_conv2d(half[0], offset, *half[1:], padding=1, mask=mask)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer.conv_offset.split(layer.conv_offset(x))[0], offset)
            assert torch.equal(layer(x), expected)


@HALF
def test_roi_pool(dtype):
    layer = DeformRoIPool(**POOLING, in_channels=4)
    nn.init.normal_(layer.offset_fc.weight)
    x = torch.rand(2, 4, 16, 16)
    half = x.to(dtype)
    with torch.no_grad():
        pooled = deform_roi_pool(half, ROIS, None, **POOLING)
        offset = layer.offset_fc(pooled.flatten(1).float()).reshape(2, 2, 3, 3)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer.predict_offset(x, ROIS), offset)
            assert torch.equal(layer(x, ROIS), deform_roi_pool(half, ROIS, offset, **POOLING))


@HALF
def test_ps_roi_pool(dtype):
    """The offset fields are pooled in float32, too."""
    layer = DeformPSRoIPool(**POOLING, group_size=3, in_channels=5)
    nn.init.normal_(layer.offset_conv.weight)
    x, feature = torch.rand(2, 2 * 9, 16, 16), torch.rand(2, 5, 16, 16).to(dtype)
    pooling = {**POOLING, "group_size": 3}
    with torch.no_grad():
        fields = conv2d(feature.float(), layer.offset_conv.weight, layer.offset_conv.bias)
        by_convolution = deform_ps_roi_pool(fields, ROIS, None, **pooling)
        offset = layer.predict_offset(feature.float(), ROIS)
        torch.testing.assert_close(offset, by_convolution)  # their order differs
        expected = deform_ps_roi_pool(x.to(dtype), ROIS, offset, **pooling)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer.predict_offset(feature, ROIS), offset)
            assert torch.equal(layer(x, ROIS, feature), expected)
            of_half_boxes = layer(x, ROIS.to(dtype), feature)
    assert of_half_boxes.dtype == dtype


def test_the_weights_of_the_branches_learn_in_float32():
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    x = torch.rand(2, 4, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    output.float().square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.dtype == torch.float32 and tensor.grad.any()
