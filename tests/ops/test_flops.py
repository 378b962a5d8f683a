"""What torch's FlopCounterMode counts, by hand-worked numbers: two FLOPs for a multiply-add."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

ROIS = torch.tensor([[0, 0, 0, 8, 8], [0, 2, 2, 9, 6], [1, 1, 3, 5, 9]], dtype=torch.float32)
# 2 pictures, 4 channels to 6, a 5 x 7 map and 3 x 3 taps
PRODUCTS = 2 * (2 * 35 * 6 * 4 * 9)
SAMPLES = 2 * 4 * (2 * 35 * 4 * 9)


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_convolution(needs):
    """Backward a product for the columns and one for the weight, a pass over the samples each."""
    need_input, need_offset, need_mask, need_weight = needs
    x = torch.rand(2, 4, 5, 7, requires_grad=need_input)
    offset = torch.zeros(2, 18, 5, 7, requires_grad=need_offset)
    mask = torch.ones(2, 9, 5, 7, requires_grad=need_mask)
    weight = torch.rand(6, 4, 3, 3, requires_grad=need_weight)
    bias = torch.zeros(6, requires_grad=True)
    run = partial(deform_conv2d, x, offset, weight, bias, padding=1, mask=mask)
    assert count(run) == PRODUCTS + SAMPLES

    coordinates = need_offset or need_mask
    products = (need_input or coordinates) + need_weight
    passes = need_input + coordinates + need_weight
    backward = count(run().sum().backward)
    assert backward == products * PRODUCTS + passes * SAMPLES


def test_convolution_of_groups():
    x, offset, weight = torch.rand(2, 4, 5, 7), torch.zeros(2, 18, 5, 7), torch.rand(6, 2, 3, 3)
    assert count(partial(deform_conv2d, x, offset, weight, padding=1)) == PRODUCTS // 2 + SAMPLES


@pytest.mark.parametrize(
    "pool, channels", [(deform_roi_pool, 5), (deform_ps_roi_pool, 5 * 2 * 2)], ids=["RoI", "PS-RoI"]
)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_pooling(pool, channels, needs):
    """3 RoIs, 5 channels, 2 x 2 bins, 3 x 3 samples; backward a pass for each gradient."""
    samples = 2 * 4 * (3 * 5 * 4 * 9)
    need_input, need_offset = needs
    x = torch.rand(2, channels, 6, 6, requires_grad=need_input)
    offset = torch.zeros(3, 2, 2, 2, requires_grad=need_offset)
    options = {"group_size": 2} if pool is deform_ps_roi_pool else {}
    run = partial(pool, x, ROIS, offset, 2, sampling_ratio=3, **options)
    assert count(run) == samples
    assert count(run().sum().backward) == (need_input + need_offset) * samples
