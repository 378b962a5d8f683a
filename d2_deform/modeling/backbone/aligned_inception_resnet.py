"""Aligned-Inception-ResNet, plain or with deformable convolutions in its last blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from fvcore.nn import weight_init
from torch import Tensor
from torch.nn import functional as F

from d2_deform.layers import DeformConv2d, ModulatedDeformConv2d

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
    "AlignedInceptionResNet",
    "InceptionResNetBlock",
    "build_aligned_inception_resnet_backbone",
]

NUM_BLOCKS = (3, 4, 23, 3)


class InceptionResNetBlock(CNNBlockBase):
    """The network's one kind of block (IRB): two branches, joined, and a shortcut.

    With w = ``bottleneck_channels``:

        branch a: conv_a1 1x1, w  -> conv_a2 3x3, w
        branch b: conv_b1 1x1, w/2 -> conv_b2 3x3, w/2 -> conv_b3 3x3, w/2
        join: both side by side (1.5 w), norm, ReLU, conv_out 1x1, + shortcut, ReLU

    A norm follows ``conv_a1``, ``conv_b1``, ``conv_b2``, ``conv_out`` and ``shortcut``, a ReLU the
    first three; ``conv_a2`` and ``conv_b3`` share the join's. ``conv_a2`` and ``conv_b2`` have the
    stride. The shortcut is a 1x1 convolution where the channels or the resolution change.

    Every convolution's window is centred on its cell (odd kernel, padding to match), so that the
    paths of different depth, and the shortcut, see the same place.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm: Any = "BN",
        dilation: int = 1,
        deformable: bool = False,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        """
        Args:
            in_channels, out_channels: of the block.
            bottleneck_channels: w, an even number.
            stride: of the block.
            norm: as :func:`detectron2.layers.get_norm` takes it.
            dilation: of all three 3x3 convolutions.
            deformable: all three 3x3 convolutions are deformable, each with a child
                ``conv_offset`` that predicts its offsets from the same input.
            deform_modulated: every tap also has a learnt factor (DCNv2).
            deform_num_groups: groups of channels with offsets of their own; a divisor of w/2 (of
                ``conv_b2`` and ``conv_b3``, and so of w).
        """
        super().__init__(in_channels, out_channels, stride)
        half = bottleneck_channels // 2

        def conv(in_channels: int, out_channels: int, with_norm: bool, **kwargs: Any) -> Conv2d:
            layer = Conv2d(
                in_channels,
                out_channels,
                bias=False,
                norm=get_norm(norm, out_channels) if with_norm else None,
                **kwargs,
            )
            weight_init.c2_msra_fill(layer)
            return layer

        def conv3x3(in_channels: int, with_norm: bool, stride: int = 1) -> Conv2d | DeformConv2d:
            layer = conv(
                in_channels,
                in_channels,
                with_norm,
                kernel_size=3,
                stride=stride,
                padding=dilation,
                dilation=dilation,
            )
            if not deformable:
                return layer
            layer_class = ModulatedDeformConv2d if deform_modulated else DeformConv2d
            return layer_class.from_conv2d(layer, deform_groups=deform_num_groups)

        self.conv_a1 = conv(in_channels, bottleneck_channels, True, kernel_size=1)
        self.conv_a2 = conv3x3(bottleneck_channels, False, stride)
        self.conv_b1 = conv(in_channels, half, True, kernel_size=1)
        self.conv_b2 = conv3x3(half, True, stride)
        self.conv_b3 = conv3x3(half, False)
        self.norm = get_norm(norm, bottleneck_channels + half)
        self.conv_out = conv(bottleneck_channels + half, out_channels, True, kernel_size=1)
        self.shortcut = (
            conv(in_channels, out_channels, True, kernel_size=1, stride=stride)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, ceil(H / stride), ceil(W / stride)].
        """
        a = self.conv_a2(F.relu_(self.conv_a1(x)))
        b = F.relu_(self.conv_b2(F.relu_(self.conv_b1(x))))
        out = torch.cat([a, self.conv_b3(b)], dim=1)
        if self.norm is not None:
            out = self.norm(out)
        out = self.conv_out(F.relu_(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class AlignedInceptionResNet(ResNet):
    """Aligned-Inception-ResNet (paper, section 3 and appendix), a Detectron2 backbone.

        >>> classifier = AlignedInceptionResNet(num_classes=1000)  # 64,381,800 parameters
        >>> backbone = AlignedInceptionResNet(3, res5_dilation=2, out_features=["res4", "res5"])

    Detectron2's basic stem, then 3, 4, 23 and 3 :class:`InceptionResNetBlock` with w = 64, 128, 256
    and 512. Stages, ``freeze`` and the output are those of Detectron2's ``ResNet``. The paper gives
    the number of parameters, 64.3 M, and no code; the block is that of the one public
    implementation, whose count fits (its author's for Caffe, MXNet and PyTorch agree).

    The network is aligned: cell (i, j) of a map of stride s has a receptive field centred on pixel
    (s * i, s * j), exactly and in every stage.

    Which of its convolutions the paper made deformable it does not say. Here a deformable block has
    all of its three 3x3 convolutions deformable, in the last blocks of the network: 3, all of res5,
    corresponds to the paper's default for ResNet-101, all 3x3 convolutions of its res5. The network
    starts as the plain one (modulated: with halved 3x3 outputs).
    """

    def __init__(
        self,
        num_deform_blocks: int = 0,
        *,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        res4_dilation: int = 1,
        res5_dilation: int = 1,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        norm: Any = "BN",
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            num_deform_blocks: how many blocks are deformable, counted from the end of the network
                built, across stages.
            deform_modulated: every tap also has a learnt factor (DCNv2).
            deform_num_groups: groups of channels with offsets of their own.
            res4_dilation, res5_dilation: of every 3x3 convolution of the stage, 1 or more. Above 1
                the stage has stride 1 instead of 2: with ``res5_dilation`` = 2 alone, res5 has
                stride 16.
            in_channels: channels of the picture.
            stem_out_channels: channels of the stem.
            res2_out_channels: channels of res2, 4 w, doubled by every further stage.
            norm: as :func:`detectron2.layers.get_norm` takes it.
            num_classes: of the classifier "linear", which follows res5 and average pooling; None:
                no classifier.
            out_features: of "stem", "res2" to "res5"; stages after the last are not built. None:
                "linear" with ``num_classes``, else "res5".
            freeze_at: how many stages are not trained, the stem the first; their batch norms become
                FrozenBN.

        Raises:
            ValueError: an argument is out of its range; the line names it, its config key and what
                is accepted.
        """
        check_dilations(res4_dilation, res5_dilation)
        check(
            "res2_out_channels (MODEL.RESNETS.RES2_OUT_CHANNELS)",
            res2_out_channels,
            res2_out_channels >= 8 and res2_out_channels % 8 == 0,
            "multiples of 8, as the branches have a quarter and an eighth of them",
        )
        check(
            "out_features",
            out_features,
            num_classes is None or out_features is None,
            "None beside num_classes, where the output is 'linear'",
        )
        num_stages = count_stages(("res5",) if out_features is None else out_features)
        num_blocks = NUM_BLOCKS[:num_stages]
        check(
            "num_deform_blocks (MODEL.DEFORM.NUM_LAYERS)",
            num_deform_blocks,
            0 <= num_deform_blocks <= sum(num_blocks),
            f"0 to {sum(num_blocks)}, the number of blocks of Aligned-Inception-ResNet up to its "
            "last output feature",
        )
        deformable_per_stage = spread_from_end(num_deform_blocks, num_blocks)

        stages = []
        stage_in, stage_out = stem_out_channels, res2_out_channels
        for stage, deformable, dilation in zip(
            STAGES, deformable_per_stage, (1, 1, res4_dilation, res5_dilation), strict=False
        ):
            half = stage_out // 8
            if any(deformable):
                check(
                    "deform_num_groups (MODEL.DEFORM.NUM_GROUPS)",
                    deform_num_groups,
                    deform_num_groups >= 1 and half % deform_num_groups == 0,
                    f"the divisors of {half}, the channels of {stage}'s narrower 3x3 convolutions",
                )
            stages.append(
                ResNet.make_stage(
                    InceptionResNetBlock,
                    len(deformable),
                    in_channels=stage_in,
                    out_channels=stage_out,
                    bottleneck_channels=2 * half,
                    stride_per_block=[first_stride(stage, dilation)] + [1] * (len(deformable) - 1),
                    norm=norm,
                    dilation=dilation,
                    deformable_per_block=[bool(count) for count in deformable],
                    deform_modulated=deform_modulated,
                    deform_num_groups=deform_num_groups,
                )
            )
            stage_in, stage_out = stage_out, 2 * stage_out

        super().__init__(
            BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm),
            stages,
            num_classes=num_classes,
            out_features=None if out_features is None else list(out_features),
            freeze_at=freeze_at,
        )


@BACKBONE_REGISTRY.register()
def build_aligned_inception_resnet_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> AlignedInceptionResNet:
    """Builds :class:`AlignedInceptionResNet` from a config.

    Reads MODEL.DEFORM, where NUM_LAYERS counts blocks, MODEL.BACKBONE.FREEZE_AT, and of
    MODEL.RESNETS: NORM, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, RES4_DILATION, RES5_DILATION and
    OUT_FEATURES. The depth and the other keys of RESNETS do not apply.

    Raises:
        ValueError: a key is out of its range, or MODEL.RESNETS.DEFORM_ON_PER_STAGE is used.
    """
    check_deform_on_per_stage(cfg)
    per_stage = cfg.MODEL.DEFORM.NUM_LAYERS_PER_STAGE
    check(
        "MODEL.DEFORM.NUM_LAYERS_PER_STAGE",
        per_stage,
        not per_stage,
        "[] in this backbone, where MODEL.DEFORM.NUM_LAYERS counts blocks from the end",
    )
    resnets = cfg.MODEL.RESNETS
    return AlignedInceptionResNet(
        cfg.MODEL.DEFORM.NUM_LAYERS,
        deform_modulated=cfg.MODEL.DEFORM.MODULATED,
        deform_num_groups=cfg.MODEL.DEFORM.NUM_GROUPS,
        res4_dilation=resnets.RES4_DILATION,
        res5_dilation=resnets.RES5_DILATION,
        in_channels=input_shape.channels,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        norm=resnets.NORM,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
