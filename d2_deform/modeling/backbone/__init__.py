"""Backbones, registered in Detectron2's ``BACKBONE_REGISTRY``."""

from .deform_resnet import (
    DeformBasicBlock,
    DeformBottleneckBlock,
    DilatedBasicBlock,
    build_deform_resnet,
    build_deform_resnet_backbone,
)

__all__ = [
    "DeformBasicBlock",
    "DeformBottleneckBlock",
    "DilatedBasicBlock",
    "build_deform_resnet",
    "build_deform_resnet_backbone",
]
