"""Deformable convolution beside torchvision's, ONNX Runtime's and the dense convolution.

    python -m benchmarks.deform_conv2d [--threads 2] [--quick] [--parts forward backward]

Inputs and weights are N(0, 1), masks uniform in [0, 1], offsets normal with a standard deviation of
2 cells; stride 1, padding that keeps the size, float32 where a case does not say otherwise. The
backward pass computes the gradients of input, offset and weight (and mask); the dense one has no
offsets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.common.machine import require_bfloat16
from benchmarks.common.peers import onnxruntime_deform_conv2d, torchvision_ops
from benchmarks.common.problem import Call, Case, Operator, Problem, Series, sides
from benchmarks.common.script import operator_main
from d2_deform.ops import deform_conv2d

OFFSET_DEVIATION = 2.0  # cells


@dataclass(frozen=True)
class Convolution:
    """As many output channels as input channels."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    dilation: int = 1
    deform_groups: int = 1
    groups: int = 1
    modulated: bool = False
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    def case(self) -> Case:
        taps, pixels = self.kernel**2, self.height * self.width
        samples = self.batch * self.channels * taps * pixels
        return Case(self.name, self.describe(), samples, self.build)

    def describe(self) -> str:
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        parts = [size, f"{self.kernel}x{self.kernel}"]
        parts += [f"dilation {self.dilation}"] * (self.dilation > 1)
        parts += [f"{self.deform_groups} deformable groups"] * (self.deform_groups > 1)
        parts += [f"{self.groups} groups"] * (self.groups > 1)
        return ", ".join(parts)

    def build(self) -> Problem:
        if self.dtype == torch.bfloat16:
            require_bfloat16()
        padding = self.dilation * (self.kernel - 1) // 2
        taps = self.deform_groups * self.kernel**2
        size = (self.height, self.width)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.randn(self.batch, self.channels, *size).to(self.dtype, memory_format=layout)
        weight = torch.randn(self.channels, self.channels // self.groups, self.kernel, self.kernel)
        weight = weight.to(self.dtype)
        offset = OFFSET_DEVIATION * torch.randn(self.batch, 2 * taps, *size)
        mask = torch.rand(self.batch, taps, *size) if self.modulated else None
        leaves = [x, offset, weight] + ([mask] if mask is not None else [])
        for leaf in leaves:
            leaf.requires_grad_()

        geometry = (None, 1, padding, self.dilation)
        peers: dict[str, Callable[[], Call]] = {}
        if self.modulated:
            peers["v1"] = lambda: partial(deform_conv2d, x, offset, weight, *geometry)
        if self.dtype == torch.float32:
            peers["torchvision"] = lambda: partial(
                torchvision_ops().deform_conv2d, x, offset, weight, *geometry, mask
            )
            peers["onnxruntime"] = partial(
                onnxruntime_deform_conv2d, x, offset, weight, mask, padding, self.dilation
            )
        else:
            whole, filters = x.detach().float(), weight.detach().float()
            peers["float32"] = lambda: partial(deform_conv2d, whole, offset, filters, *geometry)
        peers["dense"] = lambda: partial(F.conv2d, x, weight, *geometry, self.groups)
        return Problem.of(leaves, partial(deform_conv2d, x, offset, weight, *geometry, mask), peers)


RES5 = Convolution("res5", 1, 512, 38, 63, dilation=2, deform_groups=4)
RES4 = Convolution("256 channels", 1, 256, 38, 63)
CONVOLUTIONS = [
    RES5,
    replace(RES5, name="res5 v2", modulated=True),
    replace(RES5, name="res5 channels-last", channels_last=True),
    RES4,
    replace(RES4, name="batch 2", batch=2),
    replace(RES4, name="batch 8", batch=8),
    replace(RES4, name="1x1", kernel=1),
    replace(RES4, name="5x5", kernel=5),
    replace(RES4, name="depthwise", groups=256),
    Convolution("128 channels", 1, 128, 100, 152),
    Convolution("64 channels, stride 4", 1, 64, 200, 304),
    Convolution("quick start", 8, 128, 24, 24, dilation=4),
    replace(RES5, name="bfloat16", dtype=torch.bfloat16),
]
GROWTH = replace(RES4, height=19, width=32)


def operator(quick: bool) -> Operator:
    """What is measured; quick: channels and sides an eighth and a quarter as large."""
    shrunk = _shrink if quick else (lambda convolution: convolution)
    factors = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    growth, memory = shrunk(GROWTH), shrunk(RES5)
    return Operator(
        "benchmarks.deform_conv2d",
        cases=[shrunk(convolution).case() for convolution in CONVOLUTIONS],
        threads=[shrunk(convolution).case() for convolution in (RES5, RES4)],
        growth=[_pixels(growth, factors), _batch(growth, factors)],
        memory=[_batch(memory, factors[:4]), _pixels(memory, (1, 4) if quick else (1, 4, 16))],
    )


def _batch(c: Convolution, factors: tuple[int, ...]) -> Series:
    return Series.of("batch", factors, lambda n: replace(c, batch=n).case())


def _pixels(c: Convolution, factors: tuple[int, ...]) -> Series:
    def make(n: int) -> Case:
        high, wide = sides(n)
        return replace(c, height=high * c.height, width=wide * c.width).case()

    return Series.of("pixels", factors, make)


def _shrink(c: Convolution) -> Convolution:
    groups = max(1, c.groups // 8)
    return replace(
        c, channels=c.channels // 8, height=c.height // 4, width=c.width // 4, groups=groups
    )


if __name__ == "__main__":
    operator_main(operator, __doc__ or "")
