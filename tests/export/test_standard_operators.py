"""The operators written in standard ones: the compiled operators' values, shape for shape."""

import pytest
import torch

from d2_deform.export import standard_operators as standard

COMPILED = torch.ops.d2_deform


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_deform_conv2d(modulated, with_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 11)
    offset = 2 * torch.randn(2, 2 * 2 * 6, 5, 11)  # two groups, 3 x 2 taps; some leave the map
    weight = torch.randn(6, 4, 3, 2)
    bias = torch.randn(6) if with_bias else None
    mask = torch.rand(2, 2 * 6, 5, 11) if modulated else None
    arguments = (x, offset, weight, bias, mask, 2, 1, 1, 1, 1, 2)
    expected = COMPILED.deform_conv2d(*arguments)
    torch.testing.assert_close(standard.deform_conv2d(*arguments), expected, rtol=0, atol=2e-5)


def boxes(count):
    """In two pictures of 160 x 240 pixels; some reach beyond them, some are very small."""
    torch.manual_seed(1)
    corner = torch.rand(count, 2) * torch.tensor([240.0, 160.0]) - 20
    size = torch.rand(count, 2) * torch.tensor([150.0, 100.0]) ** torch.rand(count, 1)
    image = torch.arange(count)[:, None] % 2
    return torch.cat([image, corner, corner + size], dim=1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("classes", [None, 1, 3])
@pytest.mark.parametrize(
    "group_size, pooled", [(1, (3, 3)), (3, (3, 3)), (2, (4, 2))], ids=["plain", "ps", "ps-coarse"]
)
def test_pooling(aligned, classes, group_size, pooled):
    rois = boxes(40)
    x = torch.randn(2, 6 * group_size**2, 10, 15)
    # About a box size: bins that lie outside the map, wholly or in part
    offset = None if classes is None else 10 * torch.randn(40, 2 * classes, *pooled)
    arguments = (x, rois, offset, *pooled, group_size, 1 / 16, 2, 0.1, aligned)
    expected = COMPILED.deform_ps_roi_pool(*arguments)
    actual = standard.deform_ps_roi_pool(*arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert (expected == 0).any()  # of bins that hold no sample
    if group_size == 1:
        arguments = arguments[:5] + arguments[6:]
        torch.testing.assert_close(standard.deform_roi_pool(*arguments), actual, rtol=0, atol=0)


def test_no_boxes():
    arguments = (torch.randn(1, 9, 4, 4), torch.zeros(0, 5), torch.zeros(0, 2, 3, 3), 3, 3, 3)
    pooled = standard.deform_ps_roi_pool(*arguments, 1 / 16, 2, 0.1, True)
    assert pooled.shape == (0, 1, 3, 3)


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_bin_moved_out_of_reach_is_zero(shift):
    rois = torch.tensor([[0.0, 0.0, 0.0, 32.0, 32.0]])
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, 0, 0, 0] = shift
    arguments = (torch.ones(1, 1, 4, 4), rois, offset, 2, 2, 1 / 16, 2, 0.1, True)
    expected = torch.ones(1, 1, 2, 2)
    expected[0, 0, 0, 0] = 0
    torch.testing.assert_close(standard.deform_roi_pool(*arguments), expected)
