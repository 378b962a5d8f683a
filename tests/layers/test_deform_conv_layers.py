"""DeformConv2d and ModulatedDeformConv2d as modules; the arithmetic is tested in tests/ops."""

import pytest
import torch
from torch import nn

from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d, OffsetConv2d
from d2_deform.ops import reference

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 1},
]


def plain_output(layer, x):
    return nn.functional.conv2d(
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("deform_groups", [1, 2])
def test_starts_as_the_plain_convolution(geometry, deform_groups):
    layer = DeformConv2d(4, 6, **geometry, deform_groups=deform_groups)
    x = torch.rand(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), plain_output(layer, x))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modulated_starts_at_half(geometry):
    layer = ModulatedDeformConv2d(4, 6, **geometry, bias=False)
    x = torch.rand(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), plain_output(layer, x) / 2)


def test_own_branch_and_given_offsets_agree():
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, deform_groups=2)
    nn.init.normal_(layer.conv_offset.weight)
    x = torch.rand(2, 4, 9, 8)
    offset, mask = layer.conv_offset.split(layer.conv_offset(x))
    torch.testing.assert_close(layer(x, offset, mask), layer(x))
    expected = reference.deform_conv2d(
        x, offset, layer.weight, layer.bias, padding=(1, 1), mask=mask
    )
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer_class", [DeformConv2d, ModulatedDeformConv2d])
def test_every_parameter_learns(layer_class):
    layer = layer_class(4, 6, 3, padding=1)
    x = torch.rand(2, 4, 9, 8, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.any()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_norm_then_activation():
    layer = DeformConv2d(4, 6, 3, norm=nn.BatchNorm2d(6), activation=nn.functional.relu).eval()
    nn.init.constant_(layer.norm.bias, -0.1)
    x = torch.rand(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), layer.norm(plain_output(layer, x)).relu())


@pytest.mark.parametrize("batch", [0, 1])
def test_batch_sizes(batch):
    layer = DeformConv2d(4, 6, 3, stride=2, padding=1)
    x = torch.rand(batch, 4, 9, 8, requires_grad=True)
    output = layer(x)
    assert output.shape == (batch, 6, 5, 4)
    output.sum().backward()
    assert x.grad.shape == x.shape


def test_names_of_the_parameters():
    assert set(DeformConv2d(4, 6, 3).state_dict()) == {
        "weight",
        "bias",
        "conv_offset.weight",
        "conv_offset.bias",
    }
    assert set(DeformConv2d(4, 6, 3, bias=False, offset_branch=False).state_dict()) == {"weight"}


def test_branch_has_the_geometry_of_its_convolution():
    layer = DeformConv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 1), deform_groups=2)
    branch = layer.conv_offset
    assert isinstance(branch, OffsetConv2d)
    for name in ("kernel_size", "stride", "padding", "dilation", "deform_groups"):
        assert getattr(branch, name) == getattr(layer, name)


@pytest.mark.parametrize("layer_class, factor", [(DeformConv2d, 1), (ModulatedDeformConv2d, 0.5)])
def test_from_conv2d(layer_class, factor):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False).eval()
    state = torch.get_rng_state()
    layer = layer_class.from_conv2d(conv, deform_groups=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is conv.weight
    assert not layer.training
    x = torch.rand(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), factor * conv(x))


def test_from_conv2d_keeps_bias_norm_and_activation():
    conv = nn.Conv2d(4, 6, 3)
    conv.norm, conv.activation = nn.BatchNorm2d(6), nn.ReLU()
    layer = DeformConv2d.from_conv2d(conv, offset_branch=False)
    assert layer.bias is conv.bias
    assert layer.norm is conv.norm
    assert layer.activation is conv.activation
    assert layer.conv_offset is None


def test_repr():
    text = repr(DeformConv2d(4, 6, 3, padding=1, bias=False, offset_branch=False, deform_groups=2))
    assert text == (
        "DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, "
        "deform_groups=2)"
    )


def test_compiles_in_one_graph():
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 4, 9, 8)
    torch.testing.assert_close(compiled(x), layer(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"deform_groups: 3 given.*in_channels = 4"):
        DeformConv2d(4, 6, 3, deform_groups=3)
    with pytest.raises(ValueError, match="padding: 'same' given"):
        DeformConv2d(4, 6, 3, padding="same")
    with pytest.raises(ValueError, match="padding_mode: 'reflect' given"):
        DeformConv2d.from_conv2d(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))


def test_wrong_inputs():
    x, offset, mask = torch.rand(1, 4, 5, 5), torch.zeros(1, 18, 3, 3), torch.ones(1, 9, 3, 3)
    with pytest.raises(ValueError, match="offset: none given"):
        DeformConv2d(4, 6, 3, offset_branch=False)(x)
    with pytest.raises(ValueError, match="mask: given without offset"):
        ModulatedDeformConv2d(4, 6, 3)(x, mask=mask)
    with pytest.raises(ValueError, match="mask: none given"):
        ModulatedDeformConv2d(4, 6, 3)(x, offset)
    with pytest.raises(ValueError, match="mask: given, but DeformConv2d"):
        DeformConv2d(4, 6, 3)(x, offset, mask)
