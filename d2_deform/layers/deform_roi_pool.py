"""Deformable RoI pooling that learns its offsets."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2_deform.ops import deform_roi_pool

from .zero_init import ZeroLinear

__all__ = ["DeformRoIPool"]


class DeformRoIPool(nn.Module):
    """RoI pooling whose bins move (paper section 2.2, figure 3), as Faster R-CNN uses it.

    The RoI is first pooled rigidly; child ``offset_fc``, a fully connected layer that starts at
    zero, turns the result into one displacement for each bin; the RoI is then pooled again with its
    bins moved by ``gamma * displacement * (RoI width, RoI height)``.

    Shapes, with (Ph, Pw) = ``output_size``:

    - x (Tensor[N, C, H, W])
    - rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image; R may be 0
    - offsets (Tensor[R, 2, Ph, Pw]): channel 0 along x, channel 1 along y, in RoI sizes
    - output (Tensor[R, C, Ph, Pw])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 4,
        gamma: float = 0.1,
        aligned: bool = True,
        in_channels: int | None = None,
        offset_fc_dims: Sequence[int] = (),
    ) -> None:
        """
        Args:
            output_size: bins (Ph, Pw) of an RoI, or P for P x P.
            spatial_scale: cells of x per pixel of the input image, 1 / stride.
            sampling_ratio: samples on a side of each bin.
            gamma: factor of the normalised offsets.
            aligned: continuous coordinates as Detectron2's ROIAlignV2; False: the official
                release's rule, for weights trained with it.
            in_channels: channels of x, with which the layer learns offsets; None: rigid pooling.
            offset_fc_dims: outputs of hidden layers of the offset branch, each with a ReLU behind
                it; none in the paper, two of 1024 in DCNv2 and MMDetection. ``offset_fc`` is then a
                sequence, whose last layer starts at zero.
        """
        super().__init__()
        self.output_size: tuple[int, int] = _pair(output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        self.aligned = aligned
        num_bins = self.output_size[0] * self.output_size[1]
        self.offset_fc: nn.Module | None = None
        if in_channels is not None:
            widths = [in_channels * num_bins, *offset_fc_dims]
            hidden: list[nn.Module] = []
            for before, after in pairwise(widths):
                hidden += [nn.Linear(before, after), nn.ReLU(inplace=True)]
            last = ZeroLinear(widths[-1], 2 * num_bins)
            self.offset_fc = nn.Sequential(*hidden, last) if hidden else last

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            x (Tensor[N, C, H, W]): features.
            rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image.

        Returns:
            Tensor[R, C, Ph, Pw].
        """
        if self.offset_fc is None:
            return self._pool(x, rois, None)
        return self._pool(x, rois, self.predict_offset(x, rois))

    def predict_offset(self, x: Tensor, rois: Tensor) -> Tensor:
        """The displacement of every bin, before ``gamma``.

        Args:
            x (Tensor[N, C, H, W]): features.
            rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image.

        Returns:
            Tensor[R, 2, Ph, Pw].

        Raises:
            ValueError: the layer is rigid.
        """
        if self.offset_fc is None:
            raise ValueError("the layer is rigid; with in_channels it has an offset branch")
        offset = self.offset_fc(self._pool(x, rois, None).flatten(1))
        return offset.reshape(-1, 2, *self.output_size)

    def _pool(self, x: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        return deform_roi_pool(
            x,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
            self.aligned,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, aligned={self.aligned}"
        )
