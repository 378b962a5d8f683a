"""Deformable convolutions beside torchvision's and cuDNN's dense ones."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from d2_deform.ops import deform_conv2d

from .case import PRECISIONS, Case, Libraries

__all__ = ["RES5", "Layer", "convolution_cases"]


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution that keeps the size, with as many outputs as inputs."""

    name: str
    channels: int
    height: int
    width: int
    dilation: int = 1
    deform_groups: int = 1
    groups: int = 1

    def case(self, batch: int, precision: str, backward: bool, name: str | None = None) -> Case:
        element = PRECISIONS[precision].itemsize
        pixels = batch * self.height * self.width
        product = 2.0 * pixels * self.channels**2 * 9 / self.groups
        samples = pixels * self.channels * 9
        maps = element * pixels * self.channels
        weight = element * self.channels**2 * 9 // self.groups
        offsets = 4 * pixels * 18 * self.deform_groups
        if backward:
            flop, moved = 2 * product + 24 * samples, 3 * maps + 2 * weight + 2 * offsets
        else:
            flop, moved = product + 8 * samples, 2 * maps + weight + offsets
        return Case(
            f"convolution {'backward' if backward else 'forward'}",
            name or f"{self.name}, batch {batch}, {precision}",
            precision,
            flop,
            moved,
            maps + weight + offsets,
            functools.partial(self.add, batch),
        )

    def add(self, batch: int, libraries: Libraries, dtype: torch.dtype) -> None:
        """Inputs and weights N(0, 1), offsets of 2 cells, float32 as autocast leaves them."""
        size = (self.height, self.width)
        x = torch.randn(batch, self.channels, *size, device="cuda").to(dtype)
        weight = torch.randn(self.channels, self.channels // self.groups, 3, 3, device="cuda")
        weight = weight.to(dtype)
        offset = 2 * torch.randn(batch, 18 * self.deform_groups, *size, device="cuda")
        x_last = x.to(memory_format=torch.channels_last)
        weight_last = weight.to(memory_format=torch.channels_last)

        def ours(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
            return deform_conv2d(x, offset, weight, None, 1, self.dilation, self.dilation)

        def theirs(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
            geometry = (None, 1, self.dilation, self.dilation)
            return torchvision.ops.deform_conv2d(x, offset, weight, *geometry)

        def dense(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(x, weight, None, 1, self.dilation, self.dilation, self.groups)

        libraries.add("ours", ours, [x, offset, weight])
        libraries.add("ours channels-last", ours, [x_last, offset, weight])
        libraries.add("torchvision", theirs, [x, offset.to(dtype), weight])
        libraries.add("dense", dense, [x, weight])
        libraries.add("dense channels-last", dense, [x_last, weight_last])


RES5 = Layer("res5", 512, 38, 63, dilation=2, deform_groups=4)
LAYERS = [RES5, Layer("256x38x63", 256, 38, 63), Layer("128x100x152", 128, 100, 152)]
DEPTHWISE = Layer("depthwise 256x38x63", 256, 38, 63, groups=256)


def convolution_cases(quick: bool) -> Iterator[Case]:
    sizes = [(layer, batch) for layer in LAYERS for batch in (1, 2, 8)] + [(DEPTHWISE, 8)]
    for layer, batch in sizes[:1] if quick else sizes:
        for precision in PRECISIONS:
            for backward in (False, True):
                yield layer.case(batch, precision, backward)
