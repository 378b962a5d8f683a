"""Deformable RoI pooling beside torchvision's roi_align, whose bins do not move.

    python -m benchmarks.deform_roi_pool [--threads 2] [--quick] [--parts forward backward]

Maps at a sixteenth of the picture, 608 x 1008 pixels where a case does not say otherwise; boxes
inside it (common/boxes.py), 7x7 bins of 4x4 samples, offsets N(0, 1) times gamma = 0.1 of the box,
one for every bin; float32. The backward pass computes the gradients of map and offsets.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.common.boxes import random_boxes
from benchmarks.common.peers import torchvision_ops
from benchmarks.common.problem import Case, Operator, Problem, Series, sides
from benchmarks.common.script import operator_main
from d2_deform.ops import deform_roi_pool

BINS, SAMPLES, STRIDE = 7, 4, 16


@dataclass(frozen=True)
class Pooling:
    """Attributes: height and width of the map in cells; boxes of each picture."""

    name: str
    batch: int = 1
    channels: int = 256
    height: int = 38
    width: int = 63
    boxes: int = 300
    channels_last: bool = False

    def case(self) -> Case:
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        description = f"{size}, {self.batch * self.boxes} boxes"
        samples = self.batch * self.boxes * self.channels * (BINS * SAMPLES) ** 2
        return Case(self.name, description, samples, self.build)

    def build(self) -> Problem:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.randn(self.batch, self.channels, self.height, self.width)
        x = x.to(memory_format=layout).requires_grad_()
        rois = random_boxes(self.boxes, self.batch, STRIDE * self.height, STRIDE * self.width)
        offset = torch.randn(len(rois), 2, BINS, BINS, requires_grad=True)
        scale = 1 / STRIDE
        return Problem.of(
            [x, offset],
            partial(deform_roi_pool, x, rois, offset, BINS, scale, SAMPLES),
            {
                "torchvision": lambda: partial(
                    torchvision_ops().roi_align, x, rois, BINS, scale, SAMPLES, True
                )
            },
        )


GOAL = Pooling("256 channels")


def operator(quick: bool) -> Operator:
    """What is measured; quick: a sixteenth of channels and boxes."""
    pooling = replace(GOAL, channels=16, boxes=18) if quick else GOAL
    growth = replace(pooling, height=19, width=32, boxes=16)
    factors = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    return Operator(
        "benchmarks.deform_roi_pool",
        cases=[
            pooling.case(),
            replace(pooling, name="256 channels, channels-last", channels_last=True).case(),
        ],
        threads=[pooling.case()],
        growth=[_boxes(growth, factors), _batch(growth, factors)],
        memory=[_batch(pooling, factors[:4]), _pixels(pooling, (1, 4) if quick else (1, 4, 16))],
    )


def _boxes(p: Pooling, factors: tuple[int, ...]) -> Series:
    return Series.of("boxes", factors, lambda n: replace(p, boxes=n * p.boxes).case())


def _batch(p: Pooling, factors: tuple[int, ...]) -> Series:
    return Series.of("batch", factors, lambda n: replace(p, batch=n).case())


def _pixels(p: Pooling, factors: tuple[int, ...]) -> Series:
    def make(n: int) -> Case:
        high, wide = sides(n)
        return replace(p, height=high * p.height, width=wide * p.width).case()

    return Series.of("pixels", factors, make)


if __name__ == "__main__":
    operator_main(operator, __doc__ or "")
