"""The deformable ResNets against Detectron2's own."""

import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from d2_deform import add_deform_config
from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d
from d2_deform.modeling.backbone import (
    DeformBottleneckBlock,
    DilatedBasicBlock,
    build_deform_resnet,
)

DATASETS = Path(os.environ.get("DETECTRON2_DATASETS", "../shared/data/datasets"))
THIN_RESNET50 = DATASETS.parent / "weights" / "thin_resnet50_fp16.pkl"
NAME = "build_deform_resnet_backbone"
THIN = {  # channels of a network that builds in milliseconds
    "stem_out_channels": 8,
    "res2_out_channels": 16,
    "width_per_group": 4,
}
THIN_OPTS = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    16,
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    4,
]
BASIC_OPTS = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]


def thin(depth):
    return THIN if depth >= 50 else {"stem_out_channels": 8, "res2_out_channels": 8}


def make_cfg(*opts, name=NAME):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = name
    cfg.merge_from_list(list(opts))
    return cfg


def build(*opts, name=NAME):
    """In float64, so that two ways to sum differ by nothing worth a tolerance."""
    return build_backbone(make_cfg(*opts, name=name), ShapeSpec(channels=3)).eval().double()


def deformable_names(backbone):
    return [name for name, m in backbone.named_modules() if isinstance(m, DeformConv2d)]


def offset_names(state):
    return {name for name in state if "_offset." in name}


@pytest.mark.parametrize(
    "depth, count, expected",
    [
        (50, 0, []),
        (50, 1, ["res5.2.conv2"]),
        (50, 2, ["res5.1.conv2", "res5.2.conv2"]),
        (50, 3, ["res5.0.conv2", "res5.1.conv2", "res5.2.conv2"]),
        (
            101,
            6,
            [f"res4.{block}.conv2" for block in (20, 21, 22)]
            + [f"res5.{block}.conv2" for block in (0, 1, 2)],
        ),
        (18, 1, ["res5.1.conv2"]),
        (18, 3, ["res5.0.conv2", "res5.1.conv1", "res5.1.conv2"]),
    ],
)
def test_last_convolutions_are_deformable(depth, count, expected):
    backbone = build_deform_resnet(depth, count, **thin(depth))
    assert deformable_names(backbone) == expected
    assert offset_names(backbone.state_dict()) == {
        f"{name}_offset.{parameter}" for name in expected for parameter in ("weight", "bias")
    }


@pytest.mark.parametrize("depth, count", [(18, 16), (34, 32), (50, 16), (101, 33), (152, 50)])
def test_all_convolutions_may_be_deformable(depth, count):
    with torch.device("meta"):
        backbone = build_deform_resnet(depth, count)
    assert len(deformable_names(backbone)) == count
    with pytest.raises(ValueError, match=rf"NUM_LAYERS\): {count + 1} given, accepted: 0 to"):
        build_deform_resnet(depth, count + 1)


def test_counts_from_the_end_of_each_stage():
    names = deformable_names(build_deform_resnet(50, (0, 1, 2, 3)))
    stages = ["res3.3", "res4.4", "res4.5", "res5.0", "res5.1", "res5.2"]
    assert names == [f"{block}.conv2" for block in stages]
    assert deformable_names(build_deform_resnet(18, (0, 0, 1), out_features=["res4"])) == [
        "res4.1.conv2"
    ]
    with pytest.raises(ValueError, match=r"NUM_LAYERS_PER_STAGE\): \[5, 0\] given.*res2, res3, at"):
        build_deform_resnet(50, (5, 0), out_features=["res3"])


def test_counts_from_the_end_of_what_is_built():
    backbone = build_deform_resnet(50, 2, out_features=["res4"], **THIN)
    assert deformable_names(backbone) == ["res4.4.conv2", "res4.5.conv2"]
    assert not hasattr(backbone, "res5")


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", ""])
@pytest.mark.parametrize("dilation", [1, 2])
def test_starts_as_detectron2s_network(stride_in_1x1, norm, dilation):
    """Under one seed the weights are Detectron2's too, whatever is deformable."""
    opts = [*THIN_OPTS, "MODEL.RESNETS.STRIDE_IN_1X1", stride_in_1x1, "MODEL.RESNETS.NORM", norm]
    opts += ["MODEL.RESNETS.RES5_DILATION", dilation]
    torch.manual_seed(0)
    plain = build(*opts, name="build_resnet_backbone")
    torch.manual_seed(0)
    rigid = build(*opts, "MODEL.DEFORM.NUM_LAYERS", 0)
    torch.manual_seed(0)
    deformable = build(*opts, "MODEL.DEFORM.NUM_LAYERS", 6)

    assert plain.state_dict().keys() == rigid.state_dict().keys()
    state = deformable.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())

    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    expected = plain(x)
    assert plain.output_shape() == rigid.output_shape() == deformable.output_shape()
    for name, output in rigid(x).items():
        assert torch.equal(output, expected[name])
    for name, output in deformable(x).items():
        torch.testing.assert_close(output, expected[name])


def test_group_norm():
    opts = ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32]
    backbone = build(*opts)
    assert isinstance(backbone.res5[2].conv2.norm, nn.GroupNorm)
    assert backbone(torch.rand(1, 3, 32, 32, dtype=torch.float64))["res5"].shape == (1, 256, 1, 1)


@pytest.mark.parametrize("depth", [18, 34])
def test_basic_blocks_start_as_detectron2s(depth):
    opts = [*BASIC_OPTS, "MODEL.RESNETS.DEPTH", depth]
    torch.manual_seed(0)
    plain = build(*opts, name="build_resnet_backbone")
    torch.manual_seed(0)
    deformable = build(*opts, "MODEL.DEFORM.NUM_LAYERS", 5)
    keys = deformable.state_dict().keys()
    assert keys - offset_names(keys) == plain.state_dict().keys()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = plain(x)
    for name, output in deformable(x).items():
        torch.testing.assert_close(output, expected[name])


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(
    "res4, res5, strides",
    [(1, 1, (16, 32)), (1, 2, (16, 16)), (1, 6, (16, 16)), (2, 4, (8, 8)), (2, 1, (8, 16))],
)
def test_dilations(depth, res4, res5, strides):
    backbone = build_deform_resnet(
        depth,
        4,
        res4_dilation=res4,
        res5_dilation=res5,
        out_features=["res4", "res5"],
        **thin(depth),
    )
    outputs = backbone(torch.rand(1, 3, 64, 64))
    for (name, output), stride in zip(outputs.items(), strides, strict=True):
        assert backbone.output_shape()[name].stride == stride
        assert output.shape[-1] == 64 // stride
    for stage, dilation in ((backbone.res3, 1), (backbone.res4, res4), (backbone.res5, res5)):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert convs
        assert all(conv.dilation == conv.padding == (dilation, dilation) for conv in convs)


def test_dilated_stage_is_the_strided_one_on_a_finer_grid():
    """With the stride in the 1x1, every second cell of a dilated res5 is the strided res5."""
    torch.manual_seed(0)
    dilated = build_deform_resnet(50, 0, res5_dilation=2, **THIN).res5.eval()
    torch.manual_seed(0)
    strided = build_deform_resnet(50, 0, stride_in_1x1=True, **THIN).res5.eval()
    x = torch.rand(1, 64, 8, 8)
    torch.testing.assert_close(dilated(x)[:, :, ::2, ::2], strided(x))


def test_dilated_basic_block():
    torch.manual_seed(0)
    block = DilatedBasicBlock(4, 4, norm="", dilation=2)
    x = torch.rand(1, 4, 8, 8)
    inner = nn.functional.conv2d(x, block.conv1.weight, padding=2, dilation=2).relu()
    expected = (x + nn.functional.conv2d(inner, block.conv2.weight, padding=2, dilation=2)).relu()
    torch.testing.assert_close(block(x), expected)


def test_modulated_halves_the_deformable_convolution():
    block = DeformBottleneckBlock(8, 8, bottleneck_channels=4, norm="", deform_modulated=True)
    assert isinstance(block.conv2, ModulatedDeformConv2d)
    x = torch.rand(1, 8, 6, 6)
    inner = nn.functional.conv2d(block.conv1(x).relu(), block.conv2.weight, padding=1).relu()
    torch.testing.assert_close(block(x), (x + block.conv3(inner) / 2).relu())


@pytest.mark.parametrize("modulated, channels", [(False, 72), (True, 108)])
def test_deformable_groups(modulated, channels):
    backbone = build(*THIN_OPTS, "MODEL.DEFORM.NUM_GROUPS", 4, "MODEL.DEFORM.MODULATED", modulated)
    assert backbone.res5[0].conv2_offset.out_channels == channels
    assert backbone.res5[0].conv2.deform_groups == 4
    assert backbone(torch.rand(1, 3, 32, 32, dtype=torch.float64))["res5"].shape == (1, 128, 1, 1)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_parameter_learns(depth):
    backbone = build_deform_resnet(depth, 3, res5_dilation=2, **thin(depth))
    backbone(torch.rand(2, 3, 64, 64))["res5"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    offsets = [p for name, p in backbone.named_parameters() if "_offset." in name]
    assert len(offsets) == 6
    assert all(parameter.grad.any() for parameter in offsets)


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_freeze(freeze_at):
    backbone = build(*THIN_OPTS, "MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN")
    children = [backbone.stem, backbone.res2, backbone.res3, backbone.res4, backbone.res5]
    for index, child in enumerate(children, start=1):
        frozen = index <= freeze_at
        assert all(p.requires_grad != frozen for p in child.parameters())
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        assert any(isinstance(m, norm) for m in child.modules())


def test_out_features():
    backbone = build_deform_resnet(50, 0, out_features=["stem", "res3"], **THIN)
    outputs = backbone(torch.rand(1, 3, 32, 32))
    assert {name: tuple(output.shape[1:]) for name, output in outputs.items()} == {
        "stem": (8, 8, 8),
        "res3": (32, 4, 4),
    }


@pytest.mark.parametrize("depth", [50, 101])
def test_imagenet_names_and_shapes(depth):
    """Detectron2's network of full width differs from ours by the offsets alone."""
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.DEFORM.NUM_LAYERS", 6]
    with torch.device("meta"):
        plain = build(*opts, name="build_resnet_backbone").state_dict()
        ours = build(*opts).state_dict()
    assert ours.keys() - plain.keys() == offset_names(ours)
    assert {name: value.shape for name, value in plain.items()} == {
        name: value.shape for name, value in ours.items() if name in plain
    }


def test_checkpoint_of_the_plain_network_loads(tmp_path, caplog):
    plain = build(*THIN_OPTS, name="build_resnet_backbone")
    path = tmp_path / "plain.pth"
    torch.save({"model": plain.state_dict()}, path)
    backbone = build(*THIN_OPTS)
    with caplog.at_level(logging.INFO):
        DetectionCheckpointer(backbone).load(str(path))
    state = backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    (missing,) = [text for text in caplog.messages if "not found in the checkpoint" in text]
    assert "conv2_offset" in missing
    assert "norm" not in missing and "conv1" not in missing and "conv3" not in missing


@pytest.mark.skipif(not THIN_RESNET50.exists(), reason=f"{THIN_RESNET50} is missing")
def test_half_width_resnet50_loads():
    """A network of other widths; the public ``load`` only logs what did not fit."""
    backbone = build("MODEL.RESNETS.RES2_OUT_CHANNELS", 128, "MODEL.RESNETS.WIDTH_PER_GROUP", 32)
    checkpointer = DetectionCheckpointer(backbone)
    incompatible = checkpointer._load_model(checkpointer._load_file(str(THIN_RESNET50)))
    assert set(incompatible.missing_keys) == offset_names(backbone.state_dict())
    assert not incompatible.unexpected_keys
    assert not incompatible.incorrect_shapes
    assert torch.isfinite(backbone(torch.rand(1, 3, 64, 64, dtype=torch.float64))["res5"]).all()


def test_wrong_settings_name_their_key():
    with pytest.raises(ValueError, match=r"MODEL\.DEFORM\.NUM_LAYERS\): 17 given, .*0 to 16"):
        build("MODEL.DEFORM.NUM_LAYERS", 17)
    with pytest.raises(ValueError, match=r"MODEL\.DEFORM\.NUM_LAYERS\): -1 given"):
        build("MODEL.DEFORM.NUM_LAYERS", -1)
    with pytest.raises(ValueError, match=r"MODEL\.DEFORM\.NUM_GROUPS\): 3 given.*divisors of 512"):
        build("MODEL.DEFORM.NUM_GROUPS", 3)
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.RES5_DILATION\): 0 given"):
        build("MODEL.RESNETS.RES5_DILATION", 0)
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.DEPTH\): 42 given"):
        build("MODEL.RESNETS.DEPTH", 42)
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.OUT_FEATURES\): \['res6'\] given"):
        build("MODEL.RESNETS.OUT_FEATURES", ["res6"])
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.NUM_GROUPS\): 2 given"):
        build("MODEL.RESNETS.NUM_GROUPS", 2, "MODEL.RESNETS.DEPTH", 18)
    with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE.*MODEL\.DEFORM\.NUM_LAYERS"):
        build("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])


def test_warns_of_a_basic_network_of_bottleneck_width(caplog):
    with torch.device("meta"):
        build("MODEL.RESNETS.DEPTH", 18)
    assert "MODEL.RESNETS.RES2_OUT_CHANNELS is 256" in caplog.text


def test_stem_that_pools_at_the_corner_sees_two_pixels_further():
    """Caffe's pooling in ceil mode, and away from the border Detectron2's on a moved picture."""
    thin_stem = {"stem_out_channels": 4, "norm": "", "out_features": ["stem"]}
    padded = build_deform_resnet(50, 0, **thin_stem).double()
    corner = build_deform_resnet(50, 0, stem_pool_at_corner=True, **thin_stem).double()
    corner.load_state_dict(padded.state_dict())
    picture = torch.randn(1, 3, 44, 46, dtype=torch.float64)
    map_of = torch.relu(corner.stem.conv1(picture))
    caffe = torch.max_pool2d(map_of, kernel_size=3, stride=2, ceil_mode=True)
    got = corner(picture)["stem"]
    assert torch.equal(got[..., :11], caffe)  # the odd 23 columns: one cell less in Caffe
    assert got.shape == padded(picture)["stem"].shape == (1, 4, 11, 12)
    moved = padded(picture[..., 2:, 2:])["stem"]
    assert torch.equal(got[..., 2:10, 2:10], moved[..., 2:10, 2:10])


def test_offset_convolutions_may_have_a_dilation_of_their_own():
    backbone = build_deform_resnet(50, 4, res5_dilation=2, offset_dilation=1, **THIN)
    for block in (backbone.res4[-1], *backbone.res5):
        assert block.conv2_offset.dilation == block.conv2_offset.padding == (1, 1)
    assert backbone.res5[0].conv2.dilation == (2, 2)
    basic = build_deform_resnet(18, 2, res5_dilation=2, offset_dilation=1, **thin(18)).res5[1]
    assert basic.conv1_offset.dilation == basic.conv2_offset.padding == (1, 1)
    assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape[-2:] == (4, 4)
    with pytest.raises(ValueError, match=r"OFFSET_DILATION\): -1 given, accepted: 0"):
        build_deform_resnet(50, 1, offset_dilation=-1)
