"""Backbones, registered in Detectron2's ``BACKBONE_REGISTRY``."""

from .aligned_inception_resnet import (
    AlignedInceptionResNet,
    InceptionResNetBlock,
    build_aligned_inception_resnet_backbone,
)
from .deform_resnet import (
    DeformBasicBlock,
    DeformBottleneckBlock,
    DilatedBasicBlock,
    build_deform_resnet,
    build_deform_resnet_backbone,
)
from .fpn import build_aligned_inception_resnet_fpn_backbone, build_deform_resnet_fpn_backbone

__all__ = [
    "AlignedInceptionResNet",
    "DeformBasicBlock",
    "DeformBottleneckBlock",
    "DilatedBasicBlock",
    "InceptionResNetBlock",
    "build_aligned_inception_resnet_backbone",
    "build_aligned_inception_resnet_fpn_backbone",
    "build_deform_resnet",
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
]
