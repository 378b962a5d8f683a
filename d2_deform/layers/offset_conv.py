"""The convolution that predicts where a deformable convolution samples."""

from typing import Any

from torch import Tensor
from torch.nn.modules.utils import _pair

from .zero_init import ZeroConv2d

__all__ = ["OffsetConv2d"]


class OffsetConv2d(ZeroConv2d):
    """The offset branch of a deformable convolution (paper section 2.1, figure 2).

    An ordinary convolution with the kernel, stride, padding and dilation of the convolution it
    serves, on the same input, so that it has one output cell for each output cell of that one.
    Weight and bias start at zero: the deformable convolution starts as the rigid one (modulated:
    as half of it, sigmoid(0) = 0.5, as in DCNv2 and Detectron2).

    Channels, with G = ``deform_groups`` and K = kh * kw taps counted row by row:

    - ``2 * (g * K + k)`` and ``2 * (g * K + k) + 1``: group g's displacement of tap k along y and
      along x, in cells of the input map;
    - ``2 * G * K + g * K + k`` (modulated only): the logit of group g's factor of tap k.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        deform_groups: int = 1,
        modulated: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """
        Args:
            in_channels: channels of the input.
            kernel_size, stride, padding, dilation: of the convolution served; int or (y, x).
            deform_groups: G, groups of input channels that move together.
            modulated: predict a factor for each tap as well (DCNv2).
            device, dtype: as ``nn.Conv2d`` takes them.

        Raises:
            ValueError: ``deform_groups`` is below 1.
        """
        if deform_groups < 1:
            raise ValueError(f"deform_groups: {deform_groups} given, accepted is 1 or more")
        kernel_height, kernel_width = _pair(kernel_size)
        num_taps = deform_groups * kernel_height * kernel_width
        super().__init__(
            in_channels,
            (3 if modulated else 2) * num_taps,
            kernel_size,
            stride,
            padding,
            dilation,
            device=device,
            dtype=dtype,
        )
        self.deform_groups = deform_groups
        self.modulated = modulated

    def split(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Takes this layer's output apart into what the operator wants.

        Args:
            raw (Tensor[N, 2 * G * K or 3 * G * K, Ho, Wo]): output of ``forward``.

        Returns:
            offset (Tensor[N, 2 * G * K, Ho, Wo]) in cells, (y, x) for each tap, and mask
            (Tensor[N, G * K, Ho, Wo]) in (0, 1), or None unless modulated.
        """
        if not self.modulated:
            return raw, None
        num_taps = self.out_channels // 3
        return raw[:, : 2 * num_taps], raw[:, 2 * num_taps :].sigmoid()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, deform_groups={self.deform_groups}, "
            f"modulated={self.modulated}"
        )
