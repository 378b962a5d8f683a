"""Aligned-Inception-ResNet: what the paper says of it, and what a Detectron2 backbone does."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from d2_deform import add_deform_config
from d2_deform.layers import DeformConv2d, OffsetConv2d
from d2_deform.modeling.backbone import AlignedInceptionResNet, InceptionResNetBlock
from d2_deform.solver import LearningRateFactors

NAME = "build_aligned_inception_resnet_backbone"
THIN = {"stem_out_channels": 8, "res2_out_channels": 16}
THIN_OPTS = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]


def build(*opts):
    cfg: CfgNode = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.BACKBONE.NAME = NAME
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.merge_from_list([*THIN_OPTS, *opts])
    return build_backbone(cfg, ShapeSpec(channels=3))


def deformable_names(backbone):
    return [name for name, m in backbone.named_modules() if isinstance(m, DeformConv2d)]


def deformable_blocks(*names):
    return [f"{name}.{conv}" for name in names for conv in ("conv_a2", "conv_b2", "conv_b3")]


def test_parameters_of_the_classifier():
    """64.3 M in the paper; 64,252,072 in convolutions and classifier, the rest in batch norms."""
    with torch.device("meta"):
        classifier = AlignedInceptionResNet(num_classes=1000)
    sizes = {name: parameter.numel() for name, parameter in classifier.named_parameters()}
    assert sum(sizes.values()) == 64_381_800
    assert sum(size for name, size in sizes.items() if "norm" not in name) == 64_252_072
    assert [len(stage) for stage in classifier.stages] == [3, 4, 23, 3]


def test_classifier():
    classifier = AlignedInceptionResNet(num_classes=10, **THIN)
    assert classifier(torch.rand(2, 3, 64, 64))["linear"].shape == (2, 10)


def test_block():
    """By hand, with the plain functions; every second cell is left out at stride 2."""
    torch.manual_seed(0)
    block = InceptionResNetBlock(6, 16, bottleneck_channels=4, stride=2, dilation=3, norm="BN")
    block.eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 6, 9, 12)
    relu, conv = torch.relu, nn.functional.conv2d

    def conv3x3(layer, x, stride):
        return conv(x, layer.weight, stride=stride, padding=3, dilation=3)

    def conv1x1(layer, x):
        return layer.norm(conv(x, layer.weight))

    a = conv3x3(block.conv_a2, relu(conv1x1(block.conv_a1, x)), 2)
    b = conv3x3(block.conv_b2, relu(conv1x1(block.conv_b1, x)), 2)
    b = conv3x3(block.conv_b3, relu(block.conv_b2.norm(b)), 1)
    joined = relu(block.norm(torch.cat([a, b], dim=1)))
    expected = relu(conv1x1(block.conv_out, joined) + conv1x1(block.shortcut, x[:, :, ::2, ::2]))
    assert expected.shape == (2, 16, 5, 6)
    torch.testing.assert_close(block(x), expected)


def test_shortcut_only_where_something_changes():
    backbone = AlignedInceptionResNet(**THIN)
    names = [name for name, module in backbone.named_modules() if name.endswith("shortcut")]
    assert names == [f"res{stage}.0.shortcut" for stage in (2, 3, 4, 5)]


def mean_receptive_field(
    backbone: AlignedInceptionResNet, feature: str, axis: int, cell: int, length: int
) -> Tensor:
    """How much each row or column of the picture adds to one cell, with all paths weighted alike.

    Every weight is positive and the picture too, so that each ReLU lets everything through and
    nothing cancels: the support of the gradient is the theoretical receptive field.
    """
    size = [1, 3, 32, 32]
    size[axis] = length
    picture = torch.ones(size, dtype=torch.float64, requires_grad=True)
    output = backbone(picture)[feature].sum(dim=1)[0]
    output.select(axis - 2, cell).sum().backward()
    assert picture.grad is not None
    return picture.grad.sum(dim=[d for d in range(4) if d != axis])


@pytest.fixture
def even_weights(monkeypatch):
    """Makes every convolution an average, and the pooling as well, which has the same window."""
    monkeypatch.setattr(nn.functional, "max_pool2d", nn.functional.avg_pool2d)

    def apply(backbone):
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        return backbone.double().eval()

    return apply


def make_narrowest(res5_dilation):
    return AlignedInceptionResNet(
        stem_out_channels=1, res2_out_channels=8, res5_dilation=res5_dilation, out_features=["res5"]
    )


# Half of the receptive field by hand: sum over the longest path, branch b, of (kernel - 1) / 2 *
# dilation * distance of the cells read. Stem 3 + 2; res2 3 * 2 * 4; res3 4 + 8 + 3 * 2 * 8;
# res4 8 + 16 + 22 * 2 * 16; res5 at stride 32: 16 + 32 + 2 * 2 * 32; at 16, dilation 2: 6 * 2 * 16.
UP_TO_RES4 = 3 + 2 + 24 + 60 + 728


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("dilation, stride, half", [(1, 32, 176), (2, 16, 192)])
def test_receptive_field_is_centred_on_the_cells_pixel(even_weights, axis, dilation, stride, half):
    """Cell i has pixel stride * i in its middle, for every i: what "aligned" stands for."""
    backbone = even_weights(make_narrowest(dilation))
    assert backbone.output_shape()["res5"].stride == stride
    half += UP_TO_RES4
    length = 2048

    cell = 1024 // stride  # its field lies wholly inside
    field = mean_receptive_field(backbone, "res5", axis, cell, length)
    pixels = field.nonzero().flatten()
    assert (pixels[0], pixels[-1]) == (stride * cell - half, stride * cell + half)
    around = field[stride * cell - half : stride * cell + half + 1]
    torch.testing.assert_close(around, around.flip(0))
    centroid = (around * torch.arange(len(around))).sum() / around.sum()
    assert centroid.item() == pytest.approx(half)

    for cell in (0, 1, length // stride - 1):  # the picture's border cuts their fields
        pixels = mean_receptive_field(backbone, "res5", axis, cell, length).nonzero().flatten()
        assert pixels[0] == max(stride * cell - half, 0)
        assert pixels[-1] == min(stride * cell + half, length - 1)


def test_a_path_beside_the_pixel_is_seen(even_weights):
    """The test above can fail: a 2x2 window, as in networks that are not aligned, shifts it."""
    backbone = make_narrowest(res5_dilation=1)
    shortcut = backbone.res3[0].shortcut
    backbone.res3[0].shortcut = nn.Conv2d(8, 16, 2, stride=2, bias=False)
    assert shortcut.kernel_size == (1, 1)
    field = mean_receptive_field(even_weights(backbone), "res5", 3, 32, 2048)
    around = field[1024 - 993 : 1024 + 994]
    assert not torch.allclose(around, around.flip(0))


@pytest.mark.parametrize(
    "count, expected",
    [
        (0, []),
        (1, ["res5.2"]),
        (3, ["res5.0", "res5.1", "res5.2"]),
        (6, ["res4.20", "res4.21", "res4.22", "res5.0", "res5.1", "res5.2"]),
    ],
)
def test_last_blocks_are_deformable(count, expected):
    backbone = build("MODEL.DEFORM.NUM_LAYERS", count)
    assert deformable_names(backbone) == deformable_blocks(*expected)
    factors = LearningRateFactors(offset=0.5)
    offsets = {name for name, _ in backbone.named_parameters() if factors.of(name)[1] == 0.5}
    assert offsets == {
        f"{name}.conv_offset.{parameter}"
        for name in deformable_blocks(*expected)
        for parameter in ("weight", "bias")
    }


def test_counts_from_the_end_of_what_is_built():
    backbone = AlignedInceptionResNet(2, out_features=["res3"], **THIN)
    assert deformable_names(backbone) == deformable_blocks("res3.2", "res3.3")
    assert not hasattr(backbone, "res4")


@pytest.mark.parametrize("dilation, stride", [(1, 32), (2, 16), (4, 16)])
def test_starts_as_the_plain_network(dilation, stride):
    opts = ["MODEL.RESNETS.RES5_DILATION", dilation, "MODEL.RESNETS.NORM", "BN"]
    torch.manual_seed(0)
    plain = build(*opts, "MODEL.DEFORM.NUM_LAYERS", 0).double().eval()
    torch.manual_seed(0)
    deformable = build(*opts, "MODEL.DEFORM.NUM_LAYERS", 6).double().eval()

    state = deformable.state_dict()
    assert {name for name in state if "conv_offset" not in name} == plain.state_dict().keys()
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    expected, outputs = plain(x), deformable(x)
    assert outputs["res4"].shape == (1, 64, 4, 6)
    assert outputs["res5"].shape == (1, 128, 64 // stride, 96 // stride)
    assert deformable.output_shape()["res5"] == ShapeSpec(channels=128, stride=stride)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-9, atol=0)


def test_modulated_halves_the_deformable_convolutions():
    arguments = {"bottleneck_channels": 4, "norm": "", "deform_modulated": True}
    torch.manual_seed(0)
    block = InceptionResNetBlock(8, 8, deformable=True, **arguments)
    torch.manual_seed(0)
    plain = InceptionResNetBlock(8, 8, **arguments)
    with torch.no_grad():
        for conv in (plain.conv_a2, plain.conv_b2, plain.conv_b3):
            conv.weight /= 2
    assert block.conv_a2.conv_offset.out_channels == 27
    x = torch.rand(1, 8, 6, 6)
    torch.testing.assert_close(block(x), plain(x))


def test_deformable_groups():
    backbone = build("MODEL.DEFORM.NUM_GROUPS", 4)
    offsets = [m.out_channels for m in backbone.modules() if isinstance(m, OffsetConv2d)]
    assert offsets == [4 * 18] * 9


def test_dilations():
    backbone = build("MODEL.RESNETS.RES4_DILATION", 2, "MODEL.RESNETS.RES5_DILATION", 4)
    assert [shape.stride for shape in backbone.output_shape().values()] == [8, 8]
    for stage, dilation in ((backbone.res3, 1), (backbone.res4, 2), (backbone.res5, 4)):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len([m for m in convs if not isinstance(m, OffsetConv2d)]) == 3 * len(stage)
        assert all(conv.dilation == conv.padding == (dilation, dilation) for conv in convs)


def test_every_parameter_learns():
    torch.manual_seed(0)
    backbone = build("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0).train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    backbone(torch.rand(2, 3, 64, 64))["res5"].square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    offsets = [m for m in backbone.modules() if isinstance(m, OffsetConv2d)]
    assert len(offsets) == 9
    assert all(layer.weight.grad.any() and layer.bias.grad.any() for layer in offsets)
    optimizer.step()
    assert all(layer.weight.any() for layer in offsets)


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_freeze(freeze_at):
    backbone = build("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN")
    for index, child in enumerate([backbone.stem, *backbone.stages], start=1):
        frozen = index <= freeze_at
        assert all(p.requires_grad != frozen for p in child.parameters())
        kinds = {type(m) for m in child.modules() if "Norm" in type(m).__name__}
        assert kinds == {FrozenBatchNorm2d if frozen else nn.BatchNorm2d}


def test_group_norm():
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    backbone = build(*opts, "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.OUT_FEATURES", ["res2"])
    assert isinstance(backbone.res2[0].norm, nn.GroupNorm)
    assert backbone(torch.rand(1, 3, 32, 32))["res2"].shape == (1, 256, 8, 8)


def test_wrong_settings_name_their_key():
    with pytest.raises(ValueError, match=r"MODEL\.DEFORM\.NUM_LAYERS\): 34 given, .*0 to 33, the"):
        build("MODEL.DEFORM.NUM_LAYERS", 34)
    with pytest.raises(ValueError, match=r"MODEL\.DEFORM\.NUM_LAYERS\): -1 given"):
        build("MODEL.DEFORM.NUM_LAYERS", -1)
    with pytest.raises(ValueError, match=r"NUM_GROUPS\): 3 given, accepted: the divisors of 16,"):
        build("MODEL.DEFORM.NUM_GROUPS", 3)
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.RES5_DILATION\): 0 given"):
        build("MODEL.RESNETS.RES5_DILATION", 0)
    with pytest.raises(ValueError, match=r"RES2_OUT_CHANNELS\): 12 given, accepted: multiples of"):
        build("MODEL.RESNETS.RES2_OUT_CHANNELS", 12)
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.OUT_FEATURES\): \['res6'\] given"):
        build("MODEL.RESNETS.OUT_FEATURES", ["res6"])
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.OUT_FEATURES\): \[\] given"):
        build("MODEL.RESNETS.OUT_FEATURES", [])
    with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE.*MODEL\.DEFORM\.NUM_LAYERS"):
        build("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
    with pytest.raises(ValueError, match=r"out_features: \['res4'\] given, .*num_classes"):
        AlignedInceptionResNet(num_classes=10, out_features=["res4"])
