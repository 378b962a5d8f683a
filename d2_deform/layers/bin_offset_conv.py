"""The convolution that predicts where deformable position-sensitive RoI pooling moves its bins."""

import torch
from torch import Tensor

from d2_deform.ops import deform_ps_roi_pool, deform_roi_pool

from .zero_init import ZeroConv2d, outside_autocast

__all__ = ["BinOffsetConv2d"]

# Without gradients, RoIs pooled at once: their bins stay in memory that the allocator keeps.
ROIS_AT_ONCE = 128


class BinOffsetConv2d(ZeroConv2d):
    """The offset branch of R-FCN's pooling (paper section 2.2, figure 4).

    A 1x1 convolution, weight and bias starting at zero, makes offset fields, which are pooled by
    position, rigidly: one displacement for each bin and offset group.

    Both steps are linear, and the second treats all channels alike, so they may change places: the
    feature map is pooled into bins, and each bin is multiplied with the weights of its position.
    The values are the same up to rounding, and the fields, the largest maps of a detector with many
    classes, are never made. That is done on CPU, where the fields would have more channels than the
    feature map: of 38 x 63 cells, with 1024 channels, 128 RoIs and 81 classes the product has 18
    times fewer multiplications. On CUDA, and in programs that are traced or exported, so that
    counts of operations and files are those of the paper's network, the convolution comes first.
    """

    def __init__(
        self,
        in_channels: int,
        offset_groups: int,
        group_size: int,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        """
        Args:
            in_channels: channels of the feature map.
            offset_groups: K, groups of classes that move together.
            group_size: k, positions on a side.
            output_size, spatial_scale, sampling_ratio, aligned: of the pooling, as
                :func:`d2_deform.ops.deform_ps_roi_pool` takes them.
        """
        super().__init__(in_channels, 2 * offset_groups * group_size**2, kernel_size=1)
        self.group_size = group_size
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, feature: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]
        """
        Args:
            feature (Tensor[N, in_channels, H, W]): what the offsets are predicted from.
            rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in pixels of the input image.

        Returns:
            Tensor[R, 2 * K, Ph, Pw]: the displacement of every bin in RoI sizes, before gamma;
            channel 2g along x and 2g + 1 along y. Float32 under autocast.
        """
        pooled_first = (
            feature.device.type == "cpu"
            and self.out_channels > self.in_channels == feature.shape[1]
            and self.output_size == (self.group_size, self.group_size)
            and not torch.jit.is_tracing()
            and not torch.compiler.is_exporting()
        )
        compute = self._pool_and_multiply if pooled_first else self._convolve_and_pool
        return outside_autocast(compute, self.weight.dtype, feature, rois)

    def _convolve_and_pool(self, feature: Tensor, rois: Tensor) -> Tensor:
        return deform_ps_roi_pool(
            super().forward(feature),
            rois,
            None,
            self.output_size,
            self.group_size,
            self.spatial_scale,
            self.sampling_ratio,
            aligned=self.aligned,
        )

    def _pool_and_multiply(self, feature: Tensor, rois: Tensor) -> Tensor:
        # With bins of a RoI as rows of channels, the product needs no copy of them.
        feature = feature.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._pool_and_multiply_rows(feature, rois)
        parts = rois.split(ROIS_AT_ONCE)
        return torch.cat([self._pool_and_multiply_rows(feature, part) for part in parts])

    def _pool_and_multiply_rows(self, feature: Tensor, rois: Tensor) -> Tensor:
        bins = self._pool(feature, rois)
        weight = self.weight.view(-1, self.group_size**2, self.in_channels)
        offset = bins.flatten(2).permute(2, 0, 1) @ weight.permute(1, 2, 0)
        offset = offset.permute(1, 2, 0).unflatten(2, self.output_size)
        if self.bias is None:
            return offset
        # A bin without samples has no field to take a bias from.
        sampled = self._pool(feature.new_ones(len(feature), 1, *feature.shape[2:]), rois)
        return offset + sampled * self.bias.view(-1, *self.output_size)

    def _pool(self, maps: Tensor, rois: Tensor) -> Tensor:
        return deform_roi_pool(
            maps,
            rois,
            None,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            aligned=self.aligned,
        )
