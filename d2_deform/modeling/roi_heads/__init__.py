"""RoI heads, registered in Detectron2's ``ROI_HEADS_REGISTRY``."""

from .box_branch import BoxBranch
from .deform_roi_heads import DeformROIHeads
from .deform_roi_pooler import DeformROIPooler
from .iterative_localization import localize_iteratively
from .ohem import OHEM
from .output_layers import BoxOutputLayers
from .rfcn_heads import RFCNOutputLayers, RFCNROIHeads

__all__ = [
    "OHEM",
    "BoxBranch",
    "BoxOutputLayers",
    "DeformROIHeads",
    "DeformROIPooler",
    "RFCNOutputLayers",
    "RFCNROIHeads",
    "localize_iteratively",
]
