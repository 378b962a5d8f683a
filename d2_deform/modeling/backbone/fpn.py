"""Feature pyramids on this package's backbones: Detectron2's ``FPN``."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from ._stages import check
from .aligned_inception_resnet import build_aligned_inception_resnet_backbone
from .deform_resnet import build_deform_resnet_backbone

__all__ = ["build_aligned_inception_resnet_fpn_backbone", "build_deform_resnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_deform_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds Detectron2's FPN, with its p6 by max pooling, on ``build_deform_resnet_backbone``.

    Reads MODEL.FPN and what that builder reads. MODEL.DEFORM.NUM_LAYERS 13 makes all 3x3
    convolutions of res3 to res5 of ResNet-50 deformable, as in Detectron2's ``dconv_c3-c5``
    models, whose checkpoints fit by name and shape; 30 does so for ResNet-101.

    Raises:
        ValueError: a key is out of its range; stages are dilated.
    """
    return _build_fpn(cfg, build_deform_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_aligned_inception_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same on ``build_aligned_inception_resnet_backbone``; NUM_LAYERS 30 is res3 to res5."""
    return _build_fpn(cfg, build_aligned_inception_resnet_backbone(cfg, input_shape))


def _build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    for key in ("RES4_DILATION", "RES5_DILATION"):
        dilation = cfg.MODEL.RESNETS[key]
        check(f"MODEL.RESNETS.{key}", dilation, dilation == 1, "1 with FPN, where strides double")
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
