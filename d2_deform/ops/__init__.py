"""Functional operators, compiled; torch only.

``reference`` holds a slow, readable twin of each in plain PyTorch: the specification.
"""

from . import flops
from ._library import built_devices, cpu_capability
from .deform_conv2d import deform_conv2d
from .deform_ps_roi_pool import deform_ps_roi_pool
from .deform_roi_pool import deform_roi_pool

__all__ = [
    "built_devices",
    "cpu_capability",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "flops",
]
