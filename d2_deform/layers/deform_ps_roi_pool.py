"""Deformable position-sensitive RoI pooling that learns its offsets."""

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2_deform.ops import deform_ps_roi_pool

from .bin_offset_conv import BinOffsetConv2d

__all__ = ["DeformPSRoIPool"]


class DeformPSRoIPool(nn.Module):
    """Position-sensitive RoI pooling whose bins move (paper section 2.2, figure 4), as in R-FCN.

    Everything learnt is convolutional. Child ``offset_conv``, a
    :class:`~d2_deform.layers.bin_offset_conv.BinOffsetConv2d` that starts at zero, predicts offset
    fields from a feature map and pools them by position, rigidly, into one displacement for each
    bin and offset group; then the score maps are pooled with their bins moved by
    ``gamma * displacement * (RoI width, RoI height)``.

    Shapes, with k = ``group_size``, K = ``offset_groups``, (Ph, Pw) = ``output_size``:

    - score_map (Tensor[N, D * k * k, H, W]): channel (d * k + i) * k + j for bin row i, column j
    - rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image; R may be 0
    - feature (Tensor[N, in_channels, H, W])
    - offset fields (Tensor[N, 2 * K * k * k, H, W]), in the channel order of score_map
    - offsets (Tensor[R, 2 * K, Ph, Pw]): channel 2g along x and 2g + 1 along y, in RoI sizes, for
      the g-th run of D / K output channels
    - output (Tensor[R, D, Ph, Pw])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        group_size: int,
        spatial_scale: float,
        sampling_ratio: int = 4,
        gamma: float = 0.1,
        aligned: bool = True,
        in_channels: int | None = None,
        offset_groups: int = 1,
    ) -> None:
        """
        Args:
            output_size: bins (Ph, Pw) of an RoI, or P for P x P.
            group_size: k, positions on a side of the position-sensitive maps.
            spatial_scale: cells of the maps per pixel of the input image, 1 / stride.
            sampling_ratio: samples on a side of each bin.
            gamma: factor of the normalised offsets.
            aligned: continuous coordinates as Detectron2's ROIAlignV2; False: the official
                release's rule, for weights trained with it.
            in_channels: channels of the feature map that the offsets are learnt from; None: rigid
                pooling.
            offset_groups: K, a divisor of D; classes + 1 for R-FCN's scores, 1 for its boxes.

        Raises:
            ValueError: ``offset_groups`` is below 1.
        """
        super().__init__()
        if offset_groups < 1:
            raise ValueError(f"offset_groups: {offset_groups} given, accepted is 1 or more")
        self.output_size: tuple[int, int] = _pair(output_size)
        self.group_size = group_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        self.aligned = aligned
        self.offset_groups = offset_groups
        self.offset_conv = (
            None
            if in_channels is None
            else BinOffsetConv2d(
                in_channels,
                offset_groups,
                group_size,
                self.output_size,
                spatial_scale,
                sampling_ratio,
                aligned,
            )
        )

    def forward(self, score_map: Tensor, rois: Tensor, feature: Tensor | None = None) -> Tensor:
        """
        Args:
            score_map (Tensor[N, D * k * k, H, W]): position-sensitive maps.
            rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image.
            feature (Tensor[N, in_channels, H, W], optional): what the offsets are predicted from;
                not looked at by a rigid layer.

        Returns:
            Tensor[R, D, Ph, Pw].

        Raises:
            ValueError: the layer has an offset branch and ``feature`` is missing.
        """
        if self.offset_conv is None:
            return self._pool(score_map, rois)
        if feature is None:
            raise ValueError(
                "feature: none given, but the offset branch needs one of shape "
                f"(N, {self.offset_conv.in_channels}, H, W); without in_channels the layer is rigid"
            )
        return self._pool(score_map, rois, self.predict_offset(feature, rois))

    def predict_offset(self, feature: Tensor, rois: Tensor) -> Tensor:
        """The displacement of every bin, before ``gamma``.

        Args:
            feature (Tensor[N, in_channels, H, W]): what the offsets are predicted from.
            rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image.

        Returns:
            Tensor[R, 2 * K, Ph, Pw].

        Raises:
            ValueError: the layer is rigid.
        """
        if self.offset_conv is None:
            raise ValueError("the layer is rigid; with in_channels it has an offset branch")
        return self.offset_conv(feature, rois)

    def _pool(self, maps: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        return deform_ps_roi_pool(
            maps,
            rois,
            offset,
            self.output_size,
            self.group_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
            self.aligned,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, group_size={self.group_size}, "
            f"spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
            f"gamma={self.gamma}, aligned={self.aligned}, offset_groups={self.offset_groups}"
        )
