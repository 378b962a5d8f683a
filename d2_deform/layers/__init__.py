"""Deformable layers: modules that own their weights and learn their offsets (torch only)."""

from .conversion import convert_to_deformable
from .deform_conv import DeformConv2d, ModulatedDeformConv2d
from .deform_ps_roi_pool import DeformPSRoIPool
from .deform_roi_pool import DeformRoIPool
from .offset_conv import OffsetConv2d

__all__ = [
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "ModulatedDeformConv2d",
    "OffsetConv2d",
    "convert_to_deformable",
]
