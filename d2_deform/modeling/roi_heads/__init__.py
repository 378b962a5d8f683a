"""RoI heads, registered in Detectron2's ``ROI_HEADS_REGISTRY``."""

from .rfcn_heads import RFCNOutputLayers, RFCNROIHeads

__all__ = ["RFCNOutputLayers", "RFCNROIHeads"]
