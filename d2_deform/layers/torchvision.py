"""torchvision's deformable convolution by another import: the same names, arguments and weights.

    >>> from d2_deform.layers.torchvision import DeformConv2d, deform_conv2d

in place of ``from torchvision.ops import ...``. torchvision itself is not needed.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2_deform.ops import deform_conv2d

__all__ = ["DeformConv2d", "deform_conv2d"]


class DeformConv2d(nn.Module):
    """``torchvision.ops.DeformConv2d``: the offsets, and for DCNv2 the mask, are the caller's.

    It is initialised as that one, draws the same random numbers and has the same ``state_dict``.
    A layer that learns its offsets is :class:`d2_deform.layers.DeformConv2d`.
    """

    bias: nn.Parameter | None

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
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: {channels} given, accepted are multiples of {groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
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

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else f"{text}, bias=False"
