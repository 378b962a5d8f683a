"""FLOPs and activations of the compiled operators by hand-worked numbers."""

import pytest
import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2_deform.analysis import ACTIVATION_HANDLES, FLOP_HANDLES
from d2_deform.layers import DeformConv2d, DeformPSRoIPool, DeformRoIPool, ModulatedDeformConv2d
from d2_deform.modeling.backbone import build_deform_resnet

ROIS = torch.tensor([[0, 0, 0, 8, 8], [0, 2, 2, 9, 6], [1, 1, 3, 5, 9]], dtype=torch.float32)


def flops(module, *inputs):
    analysis = FlopCountAnalysis(module, inputs).set_op_handle(**FLOP_HANDLES)
    return analysis.by_operator()


def activations(module, *inputs):
    analysis = ActivationCountAnalysis(module, inputs).set_op_handle(**ACTIVATION_HANDLES)
    return analysis.by_operator()


def pytorch_flops(module, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "groups, convolution",
    [(1, 2 * 35 * 6 * 4 * 9), (2, 2 * 35 * 6 * 2 * 9)],
    ids=["dense", "grouped"],
)
def test_deformable_convolution_is_the_dense_one_and_four_for_each_sample(groups, convolution):
    """2 pictures, 4 channels to 6, a 5 x 7 map: 35 cells, 9 taps."""
    arguments = {"kernel_size": 3, "padding": 1, "groups": groups, "bias": False}
    x = torch.rand(2, 4, 5, 7)
    dense, deformable = nn.Conv2d(4, 6, **arguments), DeformConv2d(4, 6, **arguments)
    sampling = 4 * (2 * 35 * 4 * 9)
    offsets = 2 * 35 * 18 * 4 * 9
    assert flops(dense, x) == {"conv": convolution}
    assert flops(deformable, x) == {"conv": offsets, "deform_conv2d": convolution + sampling}
    # PyTorch has two FLOPs for a multiply-add
    assert pytorch_flops(dense, x) == 2 * convolution
    assert pytorch_flops(deformable, x) == 2 * (convolution + sampling + offsets)
    assert activations(deformable, x) == {"conv": 2 * 18 * 35, "deform_conv2d": 2 * 6 * 35}


def test_a_stride_and_a_mask():
    layer = ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1)
    count = flops(layer, torch.rand(1, 4, 8, 8))["deform_conv2d"]
    assert count == 16 * 6 * 4 * 9 + 4 * 16 * 4 * 9  # 4 x 4 cells


@pytest.mark.parametrize(
    "pool, channels, name",
    [
        (DeformRoIPool(2, 0.5, sampling_ratio=3), 5, "deform_roi_pool"),
        (DeformPSRoIPool(2, 2, 0.5, sampling_ratio=3), 5 * 2 * 2, "deform_ps_roi_pool"),
    ],
)
def test_pooling_is_four_for_each_sample(pool, channels, name):
    """3 RoIs, 5 channels, 2 x 2 bins, 3 x 3 samples."""
    x = torch.rand(2, channels, 6, 6)
    assert flops(pool, x, ROIS) == {name: 4 * 9 * (3 * 5 * 4)}
    assert activations(pool, x, ROIS) == {name: 3 * 5 * 4}
    assert pytorch_flops(pool, x, ROIS) == 2 * 4 * 9 * (3 * 5 * 4)


def test_deformable_pooling_pools_twice():
    """Rigidly for the offsets, 5 * 4 inputs to 2 * 4, then with them."""
    pool = DeformRoIPool(2, 0.5, sampling_ratio=3, in_channels=5)
    count = flops(pool, torch.rand(2, 5, 6, 6), ROIS)
    assert count == {"deform_roi_pool": 2 * 2160, "linear": 3 * 20 * 8}


@pytest.mark.parametrize("modulated", [False, True])
def test_both_counters_agree_on_a_backbone(modulated):
    backbone = build_deform_resnet(
        18, 3, deform_modulated=modulated, stem_out_channels=4, res2_out_channels=4
    ).eval()
    x = torch.rand(1, 3, 64, 64)
    counted = flops(backbone, x)
    assert counted["deform_conv2d"] == 3 * 4 * (32 * 32 * 9 + 4 * 32 * 9)  # 3 layers, 2 x 2 cells
    assert pytorch_flops(backbone, x) == 2 * (counted["conv"] + counted["deform_conv2d"])
