#!/usr/bin/env python
"""Times the operators beside torchvision's and beside the dense convolution, in one run.

    python benchmarks/operators.py [--threads 2] [--repeat 9]

Every row's calls are made in turn, so that all of them meet the same machine; medians, in
milliseconds. Random data. Nothing else should run beside it.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from d2_deform.ops import cpu_capability, deform_conv2d, deform_ps_roi_pool, deform_roi_pool

Call = Callable[[], object]

# (batch, channels, height, width, deformable groups, dilation) of 3x3 convolutions
CONVOLUTIONS = {
    "res5, stride 16": (1, 512, 38, 63, 4, 2),
    "res4": (1, 256, 38, 63, 1, 1),
    "res3": (1, 128, 100, 152, 1, 1),
    "quick start, res5": (8, 128, 24, 24, 1, 4),
}
POSITIONS, CLASSES = 7, (21, 81)
MAP_HEIGHT, MAP_WIDTH, STRIDE = 38, 63, 16


def medians(calls: dict[str, Call], repeat: int) -> dict[str, float]:
    """Milliseconds of each call, made in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def with_backward(calls: dict[str, Callable[[], Tensor]], leaves: list[Tensor], repeat: int) -> str:
    """One row: forward and backward medians of every call."""
    with torch.no_grad():
        forward = medians(dict(calls), repeat)
    backward: dict[str, Call] = {}
    for name, call in calls.items():
        output = call()
        backward[name] = partial(
            torch.autograd.grad,
            output,
            leaves,
            torch.randn_like(output),
            retain_graph=True,
            allow_unused=True,
        )
    back = medians(backward, repeat)
    return " | ".join(f"{forward[name]:.1f} / {back[name]:.1f}" for name in calls)


def convolution_row(name: str, repeat: int) -> str:
    batch, channels, height, width, groups, dilation = CONVOLUTIONS[name]
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3, requires_grad=True)
    offset = torch.randn(batch, 18 * groups, height, width, requires_grad=True)
    geometry = (None, 1, dilation, dilation)
    calls = {
        "ours": lambda: deform_conv2d(x, offset, weight, *geometry),
        "torchvision": lambda: torchvision.ops.deform_conv2d(x, offset, weight, *geometry),
        "dense": lambda: F.conv2d(x, weight, *geometry),
    }
    shape = f"{batch}x{channels}x{height}x{width}, {groups} groups, dilation {dilation}"
    return f"| {name}: {shape} | {with_backward(calls, [x, weight, offset], repeat)} |"


def pooling_rows(repeat: int) -> list[str]:
    # Inside the picture: ours skips samples outside the map, which would flatter it
    corners = torch.rand(300, 2) * torch.tensor([MAP_WIDTH, MAP_HEIGHT]) * STRIDE / 2
    sizes = 20 + torch.rand(300, 2) * (torch.tensor([MAP_WIDTH, MAP_HEIGHT]) * STRIDE / 2 - 20)
    rois = torch.cat([torch.zeros(300, 1), corners, corners + sizes], dim=1)
    scale, bins = 1 / STRIDE, POSITIONS
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        suffix = ", channels-last" if layout == torch.channels_last else ""
        x = torch.randn(1, 256, MAP_HEIGHT, MAP_WIDTH).to(memory_format=layout).requires_grad_()
        offset = torch.randn(300, 2, bins, bins, requires_grad=True)
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(deform_roi_pool, x, rois, offset, bins, scale),
            "torchvision": partial(torchvision.ops.roi_align, x, rois, bins, scale, 4, True),
        }
        row = with_backward(calls, [x, offset], repeat)
        rows.append(f"| RoI pooling, 256 channels{suffix} (torchvision: `roi_align`) | {row} | |")
        for classes in CLASSES:
            for groups in (classes, 1):
                maps = torch.randn(1, classes * bins**2, MAP_HEIGHT, MAP_WIDTH)
                maps = maps.to(memory_format=layout).requires_grad_()
                moves = torch.randn(300, 2 * groups, bins, bins, requires_grad=True)
                calls = {
                    "ours": partial(deform_ps_roi_pool, maps, rois, moves, bins, bins, scale),
                    "torchvision": partial(
                        torchvision.ops.ps_roi_align, maps, rois, bins, scale, 4
                    ),
                }
                row = with_backward(calls, [maps, moves], repeat)
                offsets = "offsets for each" if groups > 1 else "shared offsets"
                rows.append(
                    f"| PS-RoI pooling, {classes} classes, {offsets}{suffix} (`ps_roi_align`) | "
                    f"{row} | |"
                )
    return rows


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"{processor()}, {args.threads} threads, kernels {cpu_capability()}; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}; float32, forward / backward "
        f"in ms, median of {args.repeat}\n"
    )
    print("| operator | ours | torchvision | dense convolution |\n|---|---|---|---|")
    for name in CONVOLUTIONS:
        print(convolution_row(name, args.repeat), flush=True)
    for row in pooling_rows(args.repeat):
        print(row, flush=True)


if __name__ == "__main__":
    main()
