"""ResNets whose last 3x3 convolutions are deformable."""

import logging
from collections.abc import Sequence
from math import gcd
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor
from torch.nn import functional as F

from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d, OffsetConv2d

from ._stages import (
    STAGES,
    check,
    check_deform_on_per_stage,
    check_dilations,
    count_stages,
    first_stride,
    spread_from_end,
)

__all__ = [
    "CornerPoolStem",
    "DeformBasicBlock",
    "DeformBottleneckBlock",
    "DilatedBasicBlock",
    "build_deform_resnet",
    "build_deform_resnet_backbone",
]

logger = logging.getLogger(__name__)

NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class CornerPoolStem(BasicStem):
    """Detectron2's stem whose 3x3 pooling begins at the map's corner, as in Caffe's ResNets.

    Output cell j has its receptive field centred on pixel 4 * j + 2, not 4 * j. Maps are of the
    same size as Detectron2's; where the convolution's map has an odd size, Caffe's and MXNet's
    have one row or column less at the far end.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        # After a ReLU zeros do not change a maximum.
        return F.max_pool2d(F.pad(x, (0, 2, 0, 2)), kernel_size=3, stride=2)


class DeformBottleneckBlock(BottleneckBlock):
    """Detectron2's bottleneck block with a deformable 3x3 convolution.

    ``conv2`` is deformable; its sibling ``conv2_offset`` predicts the offsets from the same input,
    under the names of Detectron2's own ``DeformBottleneckBlock``. That class needs Detectron2's
    compiled extension, and on CPU it cannot be trained.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Any = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        offset_dilation: int = 0,
    ) -> None:
        """
        Args:
            in_channels, out_channels, bottleneck_channels, stride, num_groups, norm: as
                :class:`~detectron2.modeling.backbone.resnet.BottleneckBlock` has them.
            stride_in_1x1, dilation: likewise.
            deform_modulated: every tap also has a learnt factor (DCNv2).
            deform_num_groups: groups of channels with offsets of their own.
            offset_dilation: of ``conv2_offset``; 0: ``dilation``.
        """
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        _make_deformable(self, "conv2", deform_modulated, deform_num_groups, offset_dilation)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))

        offset, mask = self.conv2_offset.split(self.conv2_offset(out))
        out = F.relu_(self.conv2(out, offset, mask))

        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DilatedBasicBlock(BasicBlock):
    """Detectron2's block of ResNet-18/34 with dilated 3x3 convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: Any = "BN",
        dilation: int = 1,
    ) -> None:
        """
        Args:
            in_channels, out_channels, stride, norm: as
                :class:`~detectron2.modeling.backbone.resnet.BasicBlock` has them.
            dilation: of both convolutions.
        """
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


class DeformBasicBlock(DilatedBasicBlock):
    """The block of ResNet-18/34 with one or two deformable 3x3 convolutions.

    ``conv2`` is deformable and, if two are asked for, ``conv1``; their offsets come from their
    siblings ``conv2_offset`` and ``conv1_offset`` (else None).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: Any = "BN",
        dilation: int = 1,
        num_deform: int = 2,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        offset_dilation: int = 0,
    ) -> None:
        """
        Args:
            in_channels, out_channels, stride, norm, dilation: as :class:`DilatedBasicBlock` has
                them.
            num_deform: how many of the two are deformable, from the block's end: 1 or 2.
            deform_modulated: every tap also has a learnt factor (DCNv2).
            deform_num_groups: groups of channels with offsets of their own.
            offset_dilation: of the convolutions that predict them; 0: ``dilation``.

        Raises:
            ValueError: ``num_deform`` is neither 1 nor 2.
        """
        if num_deform not in (1, 2):
            raise ValueError(f"num_deform: {num_deform} given, accepted is 1 or 2")
        super().__init__(in_channels, out_channels, stride=stride, norm=norm, dilation=dilation)
        self.conv1_offset: OffsetConv2d | None = None
        for name in ("conv1", "conv2")[-num_deform:]:
            _make_deformable(self, name, deform_modulated, deform_num_groups, offset_dilation)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1_offset is None:
            out = self.conv1(x)
        else:
            offset, mask = self.conv1_offset.split(self.conv1_offset(x))
            out = self.conv1(x, offset, mask)
        out = F.relu_(out)

        offset, mask = self.conv2_offset.split(self.conv2_offset(out))
        out = self.conv2(out, offset, mask)

        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


def build_deform_resnet(
    depth: int,
    num_deform_layers: int | Sequence[int] = 3,
    *,
    deform_modulated: bool = False,
    deform_num_groups: int = 1,
    res4_dilation: int = 1,
    res5_dilation: int = 1,
    offset_dilation: int = 0,
    in_channels: int = 3,
    stem_out_channels: int = 64,
    res2_out_channels: int | None = None,
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
    stem_pool_at_corner: bool = False,
    norm: Any = "BN",
    out_features: Sequence[str] = ("res5",),
    freeze_at: int = 0,
) -> ResNet:
    """Builds a ResNet whose last 3x3 convolutions are deformable (paper sections 2.1 and 3).

        >>> backbone = build_deform_resnet(50, num_deform_layers=3, res5_dilation=2)

    All names are Detectron2's, so its checkpoints load and lack nothing but the offsets. As these
    start at zero, the network starts as the plain one (modulated: with halved 3x3 outputs).

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_deform_layers: how many 3x3 convolutions are deformable, counted from the end of the
            network built, across stages. Below depth 50 a block has two, else one. A sequence
            counts each stage from its own end, res2 first: (0, 1, 1, 3) is the official release's
            FPN.
        deform_modulated: every tap also has a learnt factor (DCNv2).
        deform_num_groups: groups of channels with offsets of their own.
        res4_dilation, res5_dilation: of every 3x3 convolution of the stage, 1 or more. Above 1 the
            stage has stride 1 instead of 2: with ``res5_dilation`` = 2 alone, res5 has stride 16.
        offset_dilation: of the convolutions that predict offsets; 0: that of the convolution they
            serve. The official release's DeepLab has 1 beside ``res5_dilation`` = 2.
        in_channels: channels of the picture.
        stem_out_channels: channels of the stem.
        res2_out_channels: channels of res2, doubled by every further stage; None: 64 below
            depth 50, else 256.
        num_groups, width_per_group: of the first stage's 3x3 convolutions, from depth 50.
        stride_in_1x1: stride of a stage in its first 1x1 instead of 3x3, from depth 50. True for
            the weights of MSRA, which the paper's and most of Detectron2's networks start from.
        stem_pool_at_corner: see :class:`CornerPoolStem`; for weights trained so.
        norm: as :func:`detectron2.layers.get_norm` takes it.
        out_features: of "stem", "res2" to "res5". Stages after the last are not built.
        freeze_at: how many stages are not trained, the stem the first; their batch norms become
            FrozenBN.

    Returns:
        Detectron2's ``ResNet``.

    Raises:
        ValueError: an argument is out of its range; the line names it, its config key and what is
            accepted.
    """
    check("depth (MODEL.RESNETS.DEPTH)", depth, depth in NUM_BLOCKS, "18, 34, 50, 101 or 152")
    check_dilations(res4_dilation, res5_dilation)
    check(
        "offset_dilation (MODEL.DEFORM.OFFSET_DILATION)",
        offset_dilation,
        offset_dilation >= 0,
        "0 (as the convolution) or more",
    )
    basic = depth < 50
    check(
        "num_groups (MODEL.RESNETS.NUM_GROUPS)",
        num_groups,
        not basic or num_groups == 1,
        f"1 for ResNet-{depth}",
    )

    num_blocks = NUM_BLOCKS[depth][: count_stages(out_features)]
    convs_per_block = 2 if basic else 1
    num_deform_per_block = _spread_deformable(depth, num_deform_layers, num_blocks, convs_per_block)

    stem_class = CornerPoolStem if stem_pool_at_corner else BasicStem
    stem = stem_class(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
    width = num_groups * width_per_group
    stage_in = stem_out_channels
    stage_out = res2_out_channels or (64 if basic else 256)
    stages = []
    for stage, num_deform, dilation in zip(
        STAGES, num_deform_per_block, (1, 1, res4_dilation, res5_dilation), strict=False
    ):
        if any(num_deform):
            if basic:  # conv1 of the first block reads the previous stage
                deform_width = gcd(stage_in, stage_out) if num_deform[0] == 2 else stage_out
            else:
                deform_width = width
            check(
                "deform_num_groups (MODEL.DEFORM.NUM_GROUPS)",
                deform_num_groups,
                deform_num_groups >= 1 and deform_width % deform_num_groups == 0,
                f"the divisors of {deform_width}, the channels of {stage}'s 3x3 convolutions",
            )
        arguments: dict[str, Any] = {
            "stride_per_block": [first_stride(stage, dilation)] + [1] * (len(num_deform) - 1),
            "basic": basic,
            "num_deform_per_block": num_deform,
            "dilation": dilation,
            "norm": norm,
            "deform_modulated": deform_modulated,
            "deform_num_groups": deform_num_groups,
            "offset_dilation": offset_dilation,
        }
        if not basic:
            arguments.update(
                bottleneck_channels=width, num_groups=num_groups, stride_in_1x1=stride_in_1x1
            )
        stages.append(
            ResNet.make_stage(
                _make_block,
                len(num_deform),
                in_channels=stage_in,
                out_channels=stage_out,
                **arguments,
            )
        )
        stage_in, stage_out, width = stage_out, 2 * stage_out, 2 * width

    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_deform_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds :func:`build_deform_resnet` from a config.

    Reads MODEL.DEFORM, MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT. Not read: RESNETS.DEFORM_*,
    which MODEL.DEFORM replaces, and what Detectron2's DeepLab project adds to RESNETS beyond
    RES4_DILATION (the stem is the basic one; a stage has one dilation).

    Raises:
        ValueError: a key is out of its range, or MODEL.RESNETS.DEFORM_ON_PER_STAGE is used.
    """
    check_deform_on_per_stage(cfg)
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH < 50 and resnets.RES2_OUT_CHANNELS == 256:
        logger.warning(
            "MODEL.RESNETS.RES2_OUT_CHANNELS is 256, four times the usual width of ResNet-%d; "
            "ImageNet weights need 64",
            resnets.DEPTH,
        )
    return build_deform_resnet(
        depth=resnets.DEPTH,
        num_deform_layers=cfg.MODEL.DEFORM.NUM_LAYERS_PER_STAGE or cfg.MODEL.DEFORM.NUM_LAYERS,
        deform_modulated=cfg.MODEL.DEFORM.MODULATED,
        deform_num_groups=cfg.MODEL.DEFORM.NUM_GROUPS,
        res4_dilation=resnets.RES4_DILATION,
        res5_dilation=resnets.RES5_DILATION,
        offset_dilation=cfg.MODEL.DEFORM.OFFSET_DILATION,
        in_channels=input_shape.channels,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        stem_pool_at_corner=cfg.MODEL.DEFORM.STEM_POOL_AT_CORNER,
        norm=resnets.NORM,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def _spread_deformable(
    depth: int, count: int | Sequence[int], num_blocks: Sequence[int], convs_per_block: int
) -> list[list[int]]:
    """How many convolutions of each block are deformable, stage by stage."""
    if isinstance(count, int):
        num_convs = convs_per_block * sum(num_blocks)
        check(
            "num_deform_layers (MODEL.DEFORM.NUM_LAYERS)",
            count,
            0 <= count <= num_convs,
            f"0 to {num_convs}, the number of 3x3 convolutions of ResNet-{depth} up to its last "
            "output feature",
        )
        return spread_from_end(count, num_blocks, convs_per_block)
    most = [convs_per_block * blocks for blocks in num_blocks]
    check(
        "num_deform_layers (MODEL.DEFORM.NUM_LAYERS_PER_STAGE)",
        list(count),
        len(count) == len(most) and all(0 <= n <= m for n, m in zip(count, most, strict=True)),
        f"a number for each of {', '.join(STAGES[: len(most)])}, at most {most}",
    )
    return [
        spread_from_end(n, [blocks], convs_per_block)[0]
        for n, blocks in zip(count, num_blocks, strict=True)
    ]


def _make_block(
    in_channels: int,
    out_channels: int,
    *,
    basic: bool,
    num_deform: int,
    deform_modulated: bool,
    deform_num_groups: int,
    offset_dilation: int,
    **kwargs: Any,
) -> CNNBlockBase:
    if num_deform == 0:
        plain = DilatedBasicBlock if basic else BottleneckBlock
        return plain(in_channels, out_channels, **kwargs)
    kwargs.update(
        deform_modulated=deform_modulated,
        deform_num_groups=deform_num_groups,
        offset_dilation=offset_dilation,
    )
    if basic:
        return DeformBasicBlock(in_channels, out_channels, num_deform=num_deform, **kwargs)
    return DeformBottleneckBlock(in_channels, out_channels, **kwargs)


def _make_deformable(
    block: CNNBlockBase, name: str, modulated: bool, deform_groups: int, offset_dilation: int
) -> None:
    """Makes convolution ``name`` of a block deformable and adds its sibling ``<name>_offset``."""
    layer_class = ModulatedDeformConv2d if modulated else DeformConv2d
    conv = layer_class.from_conv2d(
        getattr(block, name), deform_groups=deform_groups, offset_branch=False
    )
    setattr(block, name, conv)
    offset_conv = conv.make_offset_conv()
    if offset_dilation:
        offset_conv.dilation = offset_conv.padding = (offset_dilation, offset_dilation)
    setattr(block, f"{name}_offset", offset_conv)
