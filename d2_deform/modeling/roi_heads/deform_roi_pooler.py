"""Deformable RoI pooling on one or several feature maps."""

from collections.abc import Sequence
from typing import Any

from detectron2.modeling.poolers import ROIPooler
from torch import nn

from d2_deform.layers import DeformRoIPool

__all__ = ["DeformROIPooler"]


class DeformROIPooler(ROIPooler):
    """Detectron2's ``ROIPooler`` whose poolers are :class:`~d2_deform.layers.DeformRoIPool`.

    Boxes go to levels by their sizes as in Detectron2. Each level learns offsets of its own, in its
    ``level_poolers.<i>.offset_fc``, as in the official release's FPN.

    With zero offsets, as at the start, a box of at least 0.1 cells inside the picture is pooled as
    by POOLER_TYPE "ROIAlignV2" with the same sampling ratio, which is therefore the rigid twin.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: list[float] | tuple[float, ...],
        sampling_ratio: int,
        in_channels: int,
        gamma: float = 0.1,
        aligned: bool = True,
        offset_fc_dims: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            output_size: bins (Ph, Pw) of an RoI, or P for P x P; square for several maps.
            scales: cells per pixel of the input image of each map, 1 / stride.
            sampling_ratio: samples on a side of each bin, >= 1; 4 in the paper's release.
            in_channels: channels of the maps.
            gamma: factor of the normalised offsets.
            aligned: continuous coordinates as Detectron2's ROIAlignV2; False: the official
                release's rule, for weights trained with it.
            offset_fc_dims: hidden layers of the offset branches.
            **kwargs: ``canonical_box_size`` and ``canonical_level`` of
                :class:`~detectron2.modeling.poolers.ROIPooler`.

        Raises:
            ValueError: ``sampling_ratio`` is below 1.
        """
        if sampling_ratio < 1:
            raise ValueError(
                f"sampling_ratio: {sampling_ratio} given; deformable RoI pooling has a fixed "
                "number of samples, 1 or more: set MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO, to 4 "
                "as in the paper's release"
            )
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2", **kwargs)
        self.level_poolers = nn.ModuleList(
            DeformRoIPool(
                self.output_size, scale, sampling_ratio, gamma, aligned, in_channels, offset_fc_dims
            )
            for scale in scales
        )
