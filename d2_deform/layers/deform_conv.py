"""Deformable convolution layers, v1 (Dai et al. 2017) and v2 (Zhu et al. 2019)."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2_deform.ops import deform_conv2d

from .offset_conv import OffsetConv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d"]

Layer = TypeVar("Layer", bound="DeformConv2d")


class DeformConv2d(nn.Conv2d):
    """Deformable convolution that learns its offsets (paper section 2.1).

    Output cell p sums ``weight[k] * x(p + tap k + offset[k](p))`` over its taps, x read bilinearly.
    The offsets come from the layer's own branch, child ``conv_offset``, or from the caller:

        >>> layer = DeformConv2d(256, 256, 3, padding=2, dilation=2)
        >>> y = layer(x)

    Shapes, with G = ``deform_groups`` and K = kh * kw:

    - x (Tensor[N, C, H, W]); N may be 0
    - offset (Tensor[N, 2 * G * K, Ho, Wo]): for each group and tap (y, x), in cells of x
    - output (Tensor[N, Cout, Ho, Wo]), Ho and Wo as ``nn.Conv2d`` has them
    """

    # TorchScript sees an attribute of the class only if it is listed here.
    __constants__ = [*nn.Conv2d.__constants__, "modulated"]

    modulated: bool = False
    """Whether a factor for each tap goes with the offsets."""

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
        *,
        deform_groups: int = 1,
        offset_branch: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """
        Args:
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as
                ``nn.Conv2d`` takes them; int or (y, x). ``padding`` is a number.
            device, dtype: as ``nn.Conv2d`` takes them.
            deform_groups: G, groups of consecutive input channels, each with its own offsets.
            offset_branch: own the branch that predicts the offsets. Without it the caller passes
                them to ``forward``.
            norm: applied to the output.
            activation: applied last.

        Raises:
            ValueError: ``deform_groups`` does not divide ``in_channels``; ``padding`` is a string.
        """
        if deform_groups < 1 or in_channels % deform_groups:
            raise ValueError(
                f"deform_groups: {deform_groups} given, accepted are the divisors of "
                f"in_channels = {in_channels}"
            )
        if isinstance(padding, str):
            raise ValueError(f"padding: {padding!r} given, accepted is int or (int, int)")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _pair(padding),
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.deform_groups = deform_groups
        self.conv_offset = self.make_offset_conv() if offset_branch else None
        self.norm = norm
        self.activation = activation

    @classmethod
    def from_conv2d(
        cls: type[Layer], conv: nn.Conv2d, *, deform_groups: int = 1, offset_branch: bool = True
    ) -> Layer:
        """Makes a plain convolution deformable.

        Args:
            conv: shares its weight and bias with the new layer, and its ``norm`` and
                ``activation`` where it has them (Detectron2's ``Conv2d``).
            deform_groups, offset_branch: as the constructor takes them.

        Returns:
            A layer that computes what ``conv`` does until its offsets are trained (modulated: half
            of it before the bias). No random number is drawn.

        Raises:
            ValueError: ``conv`` pads with something else than zeros, or with "same" or "valid".
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv.padding_mode: {conv.padding_mode!r} given, accepted is 'zeros'")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            deform_groups=deform_groups,
            offset_branch=False,
            norm=getattr(conv, "norm", None),
            activation=getattr(conv, "activation", None),
            device="meta",
        )
        layer.weight = conv.weight
        layer.bias = conv.bias
        if offset_branch:
            layer.conv_offset = layer.make_offset_conv()
        return layer.train(conv.training)

    def make_offset_conv(self) -> OffsetConv2d:
        """A new offset branch that fits this layer: same kernel, stride, padding and dilation."""
        return OffsetConv2d(
            self.in_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,
            self.padding,
            self.dilation,
            self.deform_groups,
            self.modulated,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    def forward(
        self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x (Tensor[N, C, H, W]): features.
            offset (Tensor[N, 2 * G * K, Ho, Wo], optional): displacement of every tap, (y, x), in
                cells of x. None: the layer's own branch predicts it, and the mask.
            mask (Tensor[N, G * K, Ho, Wo], optional): factor of every tap; goes with ``offset`` in
                the modulated layer only.

        Returns:
            Tensor[N, Cout, Ho, Wo].

        Raises:
            ValueError: ``offset`` or ``mask`` is missing, or given where it is not used.
        """
        if offset is None:
            if self.conv_offset is None:
                raise ValueError(
                    "offset: none given, but this layer has no offset branch of its own; pass one "
                    "or build the layer with offset_branch=True"
                )
            if mask is not None:
                raise ValueError("mask: given without offset; pass both or neither")
            offset, mask = self.conv_offset.split(self.conv_offset(x))
        elif self.modulated and mask is None:
            raise ValueError("mask: none given beside offset; ModulatedDeformConv2d needs both")
        elif not self.modulated and mask is not None:
            raise ValueError("mask: given, but DeformConv2d uses none; see ModulatedDeformConv2d")
        x = deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}"


class ModulatedDeformConv2d(DeformConv2d):
    """Modulated deformable convolution, DCNv2 (Zhu et al. 2019, section 3.2).

    As :class:`DeformConv2d`, and every tap is multiplied by a factor between 0 and 1, which the
    branch predicts beside the offsets. Without a branch the caller passes ``offset`` and ``mask``.
    """

    modulated: bool = True
