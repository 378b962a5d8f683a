"""The drop-in beside torchvision's own DeformConv2d."""

import pytest
import torch

from d2_deform.layers.torchvision import DeformConv2d, deform_conv2d

torchvision_ops = pytest.importorskip("torchvision").ops

ARGUMENTS = [
    (4, 6, 3),
    (4, 6, (3, 2), (2, 1), (1, 0), (2, 1), 2, False),
    (4, 4, 1),
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("deform_groups", [1, 2])
def test_equals_torchvision(arguments, modulated, deform_groups):
    torch.manual_seed(0)
    theirs = torchvision_ops.DeformConv2d(*arguments)
    torch.manual_seed(0)
    ours = DeformConv2d(*arguments)
    assert repr(ours) == repr(theirs)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)  # the same start under one seed

    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 4, 9, 8)
    size = torch.nn.functional.conv2d(
        x, ours.weight, None, ours.stride, ours.padding, ours.dilation, ours.groups
    ).shape[2:]
    taps = deform_groups * ours.kernel_size[0] * ours.kernel_size[1]
    offset = torch.randn(2, 2 * taps, *size)
    mask = torch.rand(2, taps, *size) if modulated else None
    torch.testing.assert_close(ours(x, offset, mask), theirs(x, offset, mask))
    given = (x, offset, ours.weight, ours.bias, ours.stride, ours.padding, ours.dilation, mask)
    torch.testing.assert_close(deform_conv2d(*given), torchvision_ops.deform_conv2d(*given))


def test_gradients_equal_torchvision():
    layers = DeformConv2d(4, 6, 3, padding=1), torchvision_ops.DeformConv2d(4, 6, 3, padding=1)
    layers[1].load_state_dict(layers[0].state_dict())
    given = torch.rand(2, 4, 5, 7), torch.randn(2, 18, 5, 7), torch.rand(2, 9, 5, 7)
    gradients = []
    for layer in layers:
        tensors = [tensor.clone().requires_grad_() for tensor in given]
        layer(*tensors).square().sum().backward()
        gradients.append([tensor.grad for tensor in (*tensors, layer.weight, layer.bias)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_wrong_groups():
    for channels, name in (((3, 4), "in_channels: 3"), ((4, 3), "out_channels: 3")):
        with pytest.raises(ValueError, match=f"{name} given, accepted are multiples of 2"):
            DeformConv2d(*channels, 3, groups=2)
