"""Hostile arguments of the operators, drawn by hypothesis: sizes, memory layouts, coordinates.

Numbers that decide where a sample lies are such that float32 computes them exactly, in whatever
order and with whatever fused operations; so exact borders can be compared with the reference.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool, reference

from .helpers import ALL_DTYPES, WILD_NUMBERS, Arguments, Operator

OPERATORS: dict[str, tuple[Operator, Operator]] = {
    "deform_conv2d": (deform_conv2d, reference.deform_conv2d),
    "deform_roi_pool": (deform_roi_pool, reference.deform_roi_pool),
    "deform_ps_roi_pool": (deform_ps_roi_pool, reference.deform_ps_roi_pool),
}

# 1e308 is a double and no float; 2**-100 times anything here is exact, a denormal would not be.
BAD_NUMBERS = [*WILD_NUMBERS, 1e308, 2.0**-100, -(2.0**-100)]
DENORMALS = [1e-45, -1e-45, 5e-324]

# Around the kernels' registers and panels (2 to 32 numbers) and slices (64, 128 channels).
CHANNELS = [1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 66, 130]
# The pooling kernels treat bins of more than 24 cells, and rows of fewer than 8, on their own.
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 29]

Draw = Callable[[st.SearchStrategy[Any]], Any]

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0  # PROT_NONE


def between_guards(shape: list[int], dtype: torch.dtype, at_end: bool) -> Tensor:
    """A dense tensor between two pages of memory that nobody may touch, next to one of them:
    reading or writing one element too far ends the process."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    pages = -(-size // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * _PAGE):
        if _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    first = _PAGE + (pages * _PAGE - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=first)
    return flat.view(shape)


def _dense(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _sliced(shape: list[int], dtype: torch.dtype) -> Tensor:
    around = torch.full([length + 2 for length in shape], math.nan, dtype=dtype)
    return around[tuple(slice(1, -1) for _ in shape)]


def _stepped(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.full([*shape[:-1], 2 * shape[-1]], math.nan, dtype=dtype)[..., ::2]


PLACES: dict[str, Callable[[list[int], torch.dtype], Tensor]] = {
    "dense": _dense,
    "sliced out of NaN": _sliced,
    "every other element, NaN between": _stepped,
    "before a guard": lambda shape, dtype: between_guards(shape, dtype, at_end=True),
    "after a guard": lambda shape, dtype: between_guards(shape, dtype, at_end=False),
}


@st.composite
def layouts(draw: Draw) -> Callable[[Tensor], Tensor]:
    """How a tensor lies in memory: a function that lays one out, its values unchanged, unless it
    repeats one picture for all (`expand`)."""
    order = draw(st.sampled_from(["contiguous", "channels last", "transposed", "expanded"]))
    place = PLACES[draw(st.sampled_from(list(PLACES)))]

    def lay_out(values: Tensor) -> Tensor:
        if order == "expanded":
            first = lay_out_as(values[:1], list(range(values.dim())))
            return first.expand(values.shape) if values.shape[0] else first
        dimensions = list(range(values.dim()))
        if order == "channels last" and values.dim() == 4:
            dimensions = [0, 2, 3, 1]
        elif order == "transposed":
            dimensions.reverse()
        return lay_out_as(values, dimensions)

    def lay_out_as(values: Tensor, dimensions: list[int]) -> Tensor:
        room = place([values.shape[d] for d in dimensions], values.dtype)
        back = [dimensions.index(d) for d in range(values.dim())]
        return room.permute(back).copy_(values)

    return lay_out


def _spoilt(draw: Draw, generator: torch.Generator, values: Tensor, numbers: list[float]) -> Tensor:
    """`values`, some of them replaced by some of `numbers`."""
    share = draw(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]))
    chosen = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=3))
    which = torch.rand(values.shape, generator=generator) < share
    each = torch.randint(len(chosen), values.shape, generator=generator)
    return torch.where(which, torch.tensor(chosen, dtype=values.dtype)[each], values)


@st.composite
def cases(draw: Draw, name: str, bad_coordinates: bool = True) -> Arguments:
    """Arguments of the operator `name`, and `grad_output`: features and weights are of size 1,
    offsets and boxes anything; without `bad_coordinates` they are finite and of moderate size."""
    make = _conv_case if name == "deform_conv2d" else _pooling_case
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(ALL_DTYPES))
    half = dtype.itemsize == 2
    coordinates = torch.float32 if half and draw(st.booleans()) else dtype
    arguments = make(draw, name, generator, bad_coordinates)
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            kind = coordinates if key in ("offset", "mask", "rois") else dtype
            arguments[key] = draw(layouts())(value.to(kind))
    return arguments


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _whole(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from `low` to `high`."""
    return torch.randint(low, high + 1, shape, generator=generator).double()


def _conv_case(
    draw: Draw, name: str, generator: torch.Generator, bad_coordinates: bool
) -> Arguments:
    batch = draw(st.sampled_from([0, 1, 1, 2, 3]))
    kind = draw(st.sampled_from(["dense", "groups", "depthwise", "two outputs for an input"]))
    out_of_group = 1 if kind == "depthwise" else 2
    if kind in ("dense", "groups"):
        groups = 1 if kind == "dense" else draw(st.integers(2, 3))
        channels = groups * draw(st.sampled_from(CHANNELS if groups == 1 else CHANNELS[:10]))
        out_of_group = draw(st.sampled_from(CHANNELS if groups == 1 else CHANNELS[:10]))
    else:
        groups = channels = draw(st.sampled_from(CHANNELS))
    deform_groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 4) if channels % g == 0]))
    kernel, stride, padding, dilation, size, out = [], [], [], [], [], []
    for _ in range(2):
        kernel.append(draw(st.integers(1, 4)))
        stride.append(draw(st.integers(1, 3)))
        padding.append(draw(st.integers(0, 3)))
        dilation.append(draw(st.integers(1, 3)))
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        least = max(1, reach - 2 * padding[-1])
        size.append(draw(st.sampled_from([least, *(n for n in LENGTHS[:9] if n > least)])))
        out.append((size[-1] + 2 * padding[-1] - reach) // stride[-1] + 1)
    taps = kernel[0] * kernel[1]
    shape = (batch, 2 * deform_groups * taps, *out)
    moves = draw(st.sampled_from(["none", "whole", "quarters", "any"]))
    offset = {
        "none": torch.zeros(shape, dtype=torch.float64),
        "whole": _whole(generator, -max(size), max(size), *shape),
        "quarters": _whole(generator, -8, 8, *shape) / 4,
        "any": _normal(generator, *shape) * 2,
    }[moves]
    if bad_coordinates:
        beside = draw(st.sampled_from([-math.inf, math.inf]))
        if moves == "whole" and draw(st.booleans()):
            offset = torch.nextafter(offset.float(), torch.tensor(beside)).double()
        offset = _spoilt(draw, generator, offset, BAD_NUMBERS + DENORMALS)
    arguments: Arguments = {
        "input": _normal(generator, batch, channels, *size),
        "offset": offset,
        "weight": _normal(generator, groups * out_of_group, channels // groups, *kernel),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "grad_output": _normal(generator, batch, groups * out_of_group, *out),
    }
    if draw(st.booleans()):
        arguments["bias"] = _normal(generator, groups * out_of_group)
    if draw(st.booleans()):
        arguments["mask"] = _normal(generator, batch, deform_groups * taps, *out)
    return arguments


def _pooling_case(
    draw: Draw, name: str, generator: torch.Generator, bad_coordinates: bool
) -> Arguments:
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    rois = draw(st.sampled_from([0, 1, 2, 5, 17, 40]))
    positional = name == "deform_ps_roi_pool"
    group_size = draw(st.integers(1, 4)) if positional else 1
    out_channels = draw(st.sampled_from(CHANNELS[:6] if positional else CHANNELS))
    size = [draw(st.sampled_from(LENGTHS)) for _ in range(2)]
    bins = [draw(st.sampled_from([1, 2, 4])) for _ in range(2)]
    aligned = draw(st.booleans())
    scale = draw(st.sampled_from([1.0, 0.5, 0.125]))
    # In cells, boxes lie on multiples of an eighth: so the sixty-fourths of the smallest box, 0.1
    # wide, never come near a whole number.
    cells = _whole(generator, -24, 8 * max(size) + 24, rois, 4) / 8
    if draw(st.booleans()):
        first, last = cells.split(2, dim=1)
        cells = torch.cat([torch.minimum(first, last), torch.maximum(first, last)], dim=1)
    index = _whole(generator, 0, max(batch - 1, 0), rois, 1)
    boxes = torch.cat([index, cells / scale], dim=1)
    if bad_coordinates:
        boxes = _spoilt(draw, generator, boxes, [*BAD_NUMBERS, -1.0, 0.5, batch, -0.5])
    arguments: Arguments = {
        "input": _normal(generator, batch, out_channels * group_size**2, *size),
        "rois": boxes,
        "output_size": tuple(bins),
        "spatial_scale": scale,
        "sampling_ratio": draw(st.sampled_from([1, 2, 4, 4, 8, 16, 32])),
        "gamma": draw(st.sampled_from([0.125, 0.125, 1.0, 0.0])),
        "aligned": aligned,
        "grad_output": _normal(generator, rois, out_channels, *bins),
    }
    if positional:
        arguments["group_size"] = group_size
    if draw(st.booleans()):
        divisors = [k for k in range(1, out_channels + 1) if out_channels % k == 0]
        groups = draw(st.sampled_from(divisors[:3] + divisors[-1:]))
        offset = _whole(generator, -32, 32, rois, 2 * groups, *bins) / 8
        # The smallest box has no exact width: it stays where it is.
        widths = (boxes[:, 3:] - boxes[:, 1:3]) * scale
        stays = ~(widths.amin(dim=1) >= 0.25)
        offset = torch.where(stays[:, None, None, None], 0.0, offset)
        if bad_coordinates:
            offset = _spoilt(draw, generator, offset, BAD_NUMBERS)
        arguments["offset"] = offset
    return arguments
