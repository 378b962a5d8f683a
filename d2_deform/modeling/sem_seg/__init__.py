"""Semantic segmentation heads, registered in Detectron2's ``SEM_SEG_HEADS_REGISTRY``."""

from .deeplab_head import DeepLabHead

__all__ = ["DeepLabHead"]
