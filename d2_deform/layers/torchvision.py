"""torchvision's deformable convolution by another import: the same names, arguments and weights.

    >>> from d2_deform.layers.torchvision import DeformConv2d, deform_conv2d

in place of ``from torchvision.ops import ...``. torchvision itself is not needed.
"""

from torch import Tensor, nn

from d2_deform.ops import deform_conv2d

__all__ = ["DeformConv2d", "deform_conv2d"]


class DeformConv2d(nn.Conv2d):
    """``torchvision.ops.DeformConv2d``: the offsets, and for DCNv2 the mask, are the caller's.

    It is initialised as that one, draws the same random numbers and has the same ``state_dict``;
    so has ``nn.Conv2d``, whose subclass it is. A layer that learns its offsets is
    :class:`d2_deform.layers.DeformConv2d`.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        """
        Args:
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as
                ``nn.Conv2d`` takes them; int or (y, x).

        Raises:
            ValueError: ``groups`` does not divide the channels.
        """
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: {channels} given, accepted are multiples of {groups}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """
        Args:
            input (Tensor[N, C, H, W]): features.
            offset (Tensor[N, 2 * G * kh * kw, Ho, Wo]): displacement of every tap, (y, x), in
                cells.
            mask (Tensor[N, G * kh * kw, Ho, Wo], optional): factor of every tap.

        Returns:
            Tensor[N, Cout, Ho, Wo].
        """
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
        )
