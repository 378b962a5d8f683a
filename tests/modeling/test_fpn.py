"""Feature pyramids on deformable backbones, against Detectron2's."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from d2_deform import add_deform_config
from d2_deform.layers import DeformConv2d

FEATURES = ["res2", "res3", "res4", "res5"]


def build(name, *opts):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = FEATURES
    cfg.merge_from_list(list(opts))
    return build_backbone(cfg)


def shapes(backbone):
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


@pytest.mark.parametrize("depth, count, blocks", [(50, 13, (4, 6, 3)), (101, 30, (4, 23, 3))])
@pytest.mark.parametrize("modulated, channels", [(False, 18), (True, 27)])
def test_names_and_shapes_of_detectron2s_dconv_c3_c5(depth, count, blocks, modulated, channels):
    """Detectron2's plain pyramid and, by its block's source, ``conv2_offset`` with a bias.

    Its own deformable block cannot be built where Detectron2 has no compiled extension.
    """
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.DEFORM.NUM_LAYERS", count]
    with torch.device("meta"):
        theirs = build("build_resnet_fpn_backbone", *opts)
        ours = build("build_deform_resnet_fpn_backbone", *opts, "MODEL.DEFORM.MODULATED", modulated)
    expected = shapes(theirs)
    for stage, width, num_blocks in zip((3, 4, 5), (128, 256, 512), blocks, strict=True):
        for block in range(num_blocks):
            name = f"bottom_up.res{stage}.{block}.conv2_offset"
            expected[f"{name}.weight"] = (channels, width, 3, 3)
            expected[f"{name}.bias"] = (channels,)
    assert shapes(ours) == expected
    assert ours.output_shape() == theirs.output_shape()


@pytest.mark.parametrize(
    "name, count",
    [
        ("build_deform_resnet_fpn_backbone", 13),
        ("build_aligned_inception_resnet_fpn_backbone", 3 * 30),
    ],
)
def test_pyramid(name, count):
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 8]
    num_layers = 13 if "deform" in name else 30
    backbone = build(name, *opts, "MODEL.DEFORM.NUM_LAYERS", num_layers)
    deformable = [n for n, m in backbone.named_modules() if isinstance(m, DeformConv2d)]
    assert len(deformable) == count
    assert deformable[0].startswith("bottom_up.res3.0.")
    outputs = backbone(torch.rand(1, 3, 64, 128))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        f"p{level}": (1, 8, 64 // 2**level, 128 // 2**level) for level in (2, 3, 4, 5, 6)
    }


def test_dilated_stages_are_refused():
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.RES5_DILATION: 2 given, accepted: 1"):
        build("build_deform_resnet_fpn_backbone", "MODEL.RESNETS.RES5_DILATION", 2)
