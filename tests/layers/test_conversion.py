"""convert_to_deformable on networks of torchvision, of timm and made by hand."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d, convert_to_deformable

torchvision_models = pytest.importorskip("torchvision").models

# Of each library: name, then the layers that are swapped, last=2.
TORCHVISION = {
    "resnet18": ["layer4.1.conv1", "layer4.1.conv2"],
    "resnext50_32x4d": ["layer4.1.conv2", "layer4.2.conv2"],  # 32 groups
    "squeezenet1_1": ["features.11.expand3x3", "features.12.expand3x3"],
    # depthwise, kernels of 5x5 between them
    "efficientnet_b0": ["features.4.2.block.1.0", "features.7.0.block.1.0"],
    "mobilenet_v3_small": ["features.2.block.1.0", "features.3.block.1.0"],
}
TIMM = {
    "resnet26d": ["layer4.0.conv2", "layer4.1.conv2"],
    "resnext26ts": ["stages.3.0.conv2_kxk.conv", "stages.3.1.conv2_kxk.conv"],
    "densenet121": [f"features.denseblock4.denselayer{n}.conv2" for n in (15, 16)],
    "mobilenetv3_small_050": ["blocks.1.0.conv_dw", "blocks.1.1.conv_dw"],
    "efficientnet_lite0": ["blocks.3.2.conv_dw", "blocks.6.0.conv_dw"],
}


def make_network(library, name):
    torch.manual_seed(0)
    if library == "torchvision":
        return getattr(torchvision_models, name)(num_classes=10).eval()
    return pytest.importorskip("timm").create_model(name, num_classes=10).eval()


@torch.no_grad()
def run(model, x, names):
    """The network's output and those of the layers ``names``."""
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda *given, name=name: outputs.update({name: given[-1].clone()})
        )
        for name in names
    ]
    outputs[""] = model(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(
    "library, name, layers",
    [("torchvision", *item) for item in TORCHVISION.items()]
    + [("timm", *item) for item in TIMM.items()],
)
def test_networks_compute_what_they_did(library, name, layers):
    model = make_network(library, name)
    x = torch.rand(1, 3, 64, 64)
    before, parameters = run(model, x, layers), dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swapped = convert_to_deformable(model, last=2)

    assert list(swapped) == layers
    after = run(model, x, layers)
    for layer in layers:
        assert model.get_submodule(layer) is swapped[layer]
        assert before[layer].abs().max() > 0
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    now = dict(model.named_parameters())
    assert all(now[key] is parameter for key, parameter in parameters.items())
    added = now.keys() - parameters.keys()
    assert added == {f"{n}.conv_offset.{p}" for n in layers for p in ("weight", "bias")}


def test_a_network_learns_its_offsets():
    model = make_network("torchvision", "resnet18").train()
    swapped = convert_to_deformable(model, last=3, modulated=True, deform_groups=4)
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    for layer in swapped.values():
        assert type(layer) is ModulatedDeformConv2d and layer.training
        assert layer.conv_offset.out_channels == 3 * 4 * 9
        assert layer.conv_offset.weight.grad.any() and layer.weight.grad.any()


def test_a_checkpoint_of_the_plain_network_lacks_nothing_but_offsets():
    plain, model = (make_network("torchvision", "resnet18") for _ in range(2))
    convert_to_deformable(model, last=1)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"layer4.1.conv2.conv_offset.{name}" for name in ("weight", "bias")]
    assert unexpected == []


@pytest.mark.parametrize(
    "library, name, layers",
    [
        ("torchvision", "convnext_tiny", ["features.7.1.block.0", "features.7.2.block.0"]),
        ("timm", "convnext_atto", ["stages.3.blocks.0.conv_dw", "stages.3.blocks.1.conv_dw"]),
    ],
)
def test_a_network_of_other_kernels(library, name, layers):
    model = make_network(library, name)
    message = r"last: 3 given, but the model has 0 3x3 .*kernels of its convolutions: .*4x4, 7x7$"
    with pytest.raises(ValueError, match=message):
        convert_to_deformable(model)
    x = torch.rand(1, 3, 64, 64)
    before = run(model, x, layers)
    assert list(convert_to_deformable(model, last=2, kernel_size=7)) == layers
    torch.testing.assert_close(run(model, x, layers), before, rtol=1e-4, atol=1e-5)


def test_padding_as_tensorflow_is_passed_over():
    """The stride-2 convolutions of timm's tf_ networks; 3x3 is the last but three of its blocks."""
    model = make_network("timm", "tf_efficientnet_lite0")
    with pytest.warns(UserWarning, match=r"passed over: blocks.3.0.conv_dw Conv2dSame computes"):
        swapped = convert_to_deformable(model, last=4)
    names = ["blocks.1.1", "blocks.3.1", "blocks.3.2", "blocks.6.0"]
    assert list(swapped) == [f"{name}.conv_dw" for name in names]


class _Crossed(nn.Module):
    """Runs its layers the other way round than it registers them, ``shared`` first and last."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(2, 2, 3, padding=1)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.head = nn.Sequential(nn.Conv2d(2, 2, 1), self.shared)

    def forward(self, x):
        return self.head(self.second(self.first(self.shared(x))))


def test_order_of_execution():
    x = torch.rand(1, 2, 5, 5)
    assert list(convert_to_deformable(_Crossed(), last=3)) == ["second", "shared", "first.0"]
    model = _Crossed()
    model.first[1].eval()
    before = [buffer.clone() for buffer in model.buffers()]
    swapped = convert_to_deformable(model, last=3, example_input=x)
    assert list(swapped) == ["first.0", "second", "shared"]
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    assert model.training and model.second.training and not model.first[1].training
    assert not model.unused._forward_pre_hooks
    # a layer that stands in two places stays one
    assert model.shared is model.head[1] is swapped["shared"]
    with pytest.raises(ValueError, match="last: 5 given, but the model has 4 3x3"):
        convert_to_deformable(_Crossed(), last=5)


def test_order_of_execution_of_parallel_branches():
    registered, executed = (make_network("timm", "hrnet_w18_small") for _ in range(2))
    names = list(convert_to_deformable(registered, last=2))
    assert names == ["downsamp_modules.1.0", "downsamp_modules.2.0"]
    names = list(convert_to_deformable(executed, last=2, example_input=torch.rand(1, 3, 64, 64)))
    assert names == ["incre_modules.3.0.conv2", "downsamp_modules.2.0"]


@pytest.mark.parametrize(
    "spoil, obstacle",
    [
        (parametrizations.weight_norm, "has a parametrisation"),
        (lambda conv: conv.register_forward_hook(print), "has hooks"),
        (lambda conv: setattr(conv, "padding_mode", "reflect"), r"pads with reflect by \(1, 1\)"),
        (lambda conv: setattr(conv, "padding", "same"), "pads with zeros by 'same'"),
    ],
)
def test_what_cannot_be_swapped(spoil, obstacle):
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)))
    spoil(model[2])
    with pytest.raises(ValueError, match=f"passed over: 2 {obstacle}. The kernels .*: 3x3"):
        convert_to_deformable(model)
    with pytest.warns(UserWarning, match=f"passed over: 2 {obstacle}; swapped: 1"):
        assert list(convert_to_deformable(model, last=1)) == ["1"]


def test_what_is_deformable_already():
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)))
    convert_to_deformable(model, last=1)
    with pytest.warns(UserWarning, match="passed over: 2 is deformable already; swapped: 1"):
        convert_to_deformable(model, last=1)
    assert [type(layer) for layer in model] == [nn.Conv2d, DeformConv2d, DeformConv2d]


def test_wrong_arguments_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"0: deform_groups: 2 given.*in_channels = 3"):
        convert_to_deformable(model, last=2, deform_groups=2)
    with pytest.raises(ValueError, match="last: 0 given"):
        convert_to_deformable(model, last=0)
    with pytest.raises(ValueError, match="model: is a convolution itself"):
        convert_to_deformable(nn.Conv2d(3, 4, 3), last=1)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d]
