"""torch.compile of backbones, cut off behind res2: one graph for all sizes, the same numbers."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from d2_deform.layers import DeformConv2d
from d2_deform.modeling.backbone import AlignedInceptionResNet, build_deform_resnet

SIZES = [(2, 64, 96), (3, 96, 32)]
THIN = {"stem_out_channels": 4, "out_features": ["res2"]}


def make_resnet(modulated):
    return build_deform_resnet(18, 2, deform_modulated=modulated, res2_out_channels=4, **THIN)


def make_frozen_resnet(modulated):
    widths = {"res2_out_channels": 8, "width_per_group": 4}
    return build_deform_resnet(50, 1, deform_modulated=modulated, norm="FrozenBN", **widths, **THIN)


def make_inception_resnet(modulated):
    return AlignedInceptionResNet(1, deform_modulated=modulated, res2_out_channels=16, **THIN)


def run(function, model, picture):
    """Output and gradients, that of the picture among them."""
    x = picture.clone().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, [0, 2, 3])
    output = function(x)
    output = output["res2"] if isinstance(output, dict) else output
    model.zero_grad()
    output.square().mean().backward()
    gradients = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    return [output.detach(), x.grad, *gradients]


@pytest.mark.parametrize(
    "make_backbone, modulated",
    [
        (make_resnet, False),
        (make_frozen_resnet, True),
        (make_inception_resnet, False),
        (make_inception_resnet, True),
    ],
)
def test_backbones(make_backbone, modulated):
    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = make_backbone(modulated).eval()
    for name, parameter in backbone.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(backbone, fullgraph=True, backend=counter)
    for batch, height, width in SIZES:
        picture = torch.rand(batch, 3, height, width)
        expected, actual = (run(f, backbone, picture) for f in (backbone, compiled))
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_generated_code():
    """By Inductor, which fuses what stands around the operator."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DeformConv2d(3, 4, 3, padding=1, norm=nn.BatchNorm2d(4), activation=nn.functional.relu)
    nn.init.normal_(layer.conv_offset.weight)
    compiled = torch.compile(layer, fullgraph=True)
    for batch, height, width in SIZES:
        picture = torch.rand(batch, 3, height, width)
        expected, actual = (run(f, layer, picture) for f in (layer, compiled))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
