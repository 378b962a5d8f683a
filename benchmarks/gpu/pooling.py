"""Deformable RoI and PS-RoI pooling beside torchvision's rigid ones of the same samples."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from benchmarks.common.boxes import random_boxes
from d2_deform.ops import deform_ps_roi_pool, deform_roi_pool

from .case import PRECISIONS, Case, Libraries

__all__ = ["pooling_cases"]

BOXES, BINS, SAMPLES, STRIDE = 300, 7, 4, 16
HEIGHT, WIDTH = 38, 63


@dataclass(frozen=True)
class Pool:
    """300 boxes a picture, 7x7 bins of 4x4 samples.

    Attributes:
        channels: of the output.
        group_size: 1: RoI pooling; 7: position-sensitive.
        offset_groups: output channels with offsets of their own.
    """

    name: str
    channels: int
    group_size: int = 1
    offset_groups: int = 1

    def case(self, batch: int, precision: str, backward: bool) -> Case:
        element = PRECISIONS[precision].itemsize
        outputs = batch * BOXES * BINS**2 * self.channels
        maps = batch * HEIGHT * WIDTH * self.channels * self.group_size**2
        passes = 2 if backward else 1
        return Case(
            f"pooling {'backward' if backward else 'forward'}",
            f"{self.name}, batch {batch}, {precision}",
            precision,
            8.0 * passes * outputs * SAMPLES**2,
            element * (outputs + passes * maps),
            element * maps,
            functools.partial(self.add, batch),
        )

    def add(self, batch: int, libraries: Libraries, dtype: torch.dtype) -> None:
        """Maps N(0, 1), offsets of 0.1 of the box, boxes inside the picture."""
        channels = self.channels * self.group_size**2
        x = torch.randn(batch, channels, HEIGHT, WIDTH, device="cuda").to(dtype)
        rois = random_boxes(BOXES, batch, HEIGHT * STRIDE, WIDTH * STRIDE).cuda()
        offset = torch.randn(len(rois), 2 * self.offset_groups, BINS, BINS, device="cuda")
        boxes = rois.to(dtype)

        def ours(x: Tensor, offset: Tensor) -> Tensor:
            if self.group_size == 1:
                return deform_roi_pool(x, rois, offset, BINS, 1 / STRIDE, SAMPLES)
            return deform_ps_roi_pool(x, rois, offset, BINS, self.group_size, 1 / STRIDE, SAMPLES)

        def theirs(x: Tensor) -> Tensor:
            if self.group_size == 1:
                return torchvision.ops.roi_align(x, boxes, BINS, 1 / STRIDE, SAMPLES, aligned=True)
            return torchvision.ops.ps_roi_align(x, boxes, BINS, 1 / STRIDE, SAMPLES)

        libraries.add("ours", ours, [x, offset])
        x_last = x.to(memory_format=torch.channels_last)
        libraries.add("ours channels-last", ours, [x_last, offset])
        libraries.add("torchvision", theirs, [x])


POOLS = [
    Pool("RoI, 256 channels", 256),
    Pool("PS-RoI, 21 classes", 21, BINS),
    Pool("PS-RoI, 21 classes, own offsets", 21, BINS, 21),
    Pool("PS-RoI, 81 classes", 81, BINS),
    Pool("PS-RoI, 81 classes, own offsets", 81, BINS, 81),
]


def pooling_cases(quick: bool) -> Iterator[Case]:
    for pool in POOLS[:1] if quick else POOLS:
        for batch in (1, 2):
            for precision in ("fp32", "fp16", "bf16"):
                for backward in (False, True):
                    yield pool.case(batch, precision, backward)
