"""Deformable PS-RoI pooling: which channel a bin reads. The rest is in test_pooling.py, and, as
one group is RoI pooling, in test_deform_roi_pool.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

from d2_deform.ops import deform_ps_roi_pool, reference

from .helpers import Operator, assert_matches, assert_near, random, run
from .pooling import make_arguments, random_rois

IMPLEMENTATIONS = [
    pytest.param(deform_ps_roi_pool, id="compiled"),
    pytest.param(reference.deform_ps_roi_pool, id="reference"),
]
BOTH = pytest.mark.parametrize("operator", IMPLEMENTATIONS)

BINS_AND_GROUPS: list[tuple[int | tuple[int, int], int]] = [
    (3, 3),
    ((3, 4), 2),
    (2, 3),
    (7, 7),
    (6, 3),
    (5, 3),
    (1, 4),
    ((2, 9), 5),
]


@BOTH
@pytest.mark.parametrize(("bins", "group_size"), BINS_AND_GROUPS, ids=str)
def test_each_bin_reads_its_own_channel(
    device: str, operator: Operator, bins: int | tuple[int, int], group_size: int
) -> None:
    """Every channel holds its own number, and the gradient finds it again."""
    out_channels = 3
    channels = out_channels * group_size**2
    input = torch.arange(float(channels), device=device)[None, :, None, None].repeat(1, 1, 6, 5)
    rois = torch.tensor([[0.0, 0.3, 0.6, 4.4, 5.1]], device=device)
    rows, columns = (bins, bins) if isinstance(bins, int) else bins
    expected = torch.tensor(
        [
            [
                [
                    (c * group_size + ph * group_size // rows) * group_size
                    + pw * group_size // columns
                    for pw in range(columns)
                ]
                for ph in range(rows)
            ]
            for c in range(out_channels)
        ],
        device=device,
    )
    input.requires_grad_()
    output = operator(input, rois, output_size=bins, group_size=group_size)
    torch.testing.assert_close(output[0], expected.float(), rtol=1e-6, atol=1e-6)

    output.sum().backward()
    assert input.grad is not None
    reads = torch.bincount(expected.flatten(), minlength=channels)
    torch.testing.assert_close(input.grad.sum(dim=(0, 2, 3)), reads.float())


@BOTH
@pytest.mark.parametrize("bins", [1, 3, (3, 2)], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_one_group_is_roi_pooling(
    device: str, operator: Operator, aligned: bool, bins: int | tuple[int, int]
) -> None:
    arguments = make_arguments(
        "deform_ps_roi_pool", device, group_size=1, output_size=bins, aligned=aligned
    )
    output, gradients = run(operator, arguments)
    del arguments["group_size"]
    expected_output, expected_gradients = run(reference.deform_roi_pool, arguments)
    assert_near(output, expected_output, 1e-13)
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], 1e-12, f"gradient of {name}")


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("ratio", [1, 4])
def test_rigid_is_ps_roi_align_inside_the_map(
    device: str, operator: Operator, ratio: int, size: int
) -> None:
    input = random(2, 2 * size**2, 11, 13, dtype=torch.float64, device=device)
    rois = random_rois(20, 2, (11, 13), 0.5).to(device)
    # torchvision has no smallest box and counts samples outside.
    rois[:, 1::2] = rois[:, 1::2].clamp(0, 26)
    rois[:, 2::2] = rois[:, 2::2].clamp(0, 22)
    expected = torchvision.ops.ps_roi_align(input, rois, size, 0.5, ratio)
    output = operator(
        input, rois, output_size=size, group_size=size, spatial_scale=0.5, sampling_ratio=ratio
    )
    assert_near(output, expected, 1e-12)


@BOTH
def test_offset_groups_are_consecutive_output_channels(device: str, operator: Operator) -> None:
    """A map that grows along x, four output channels, two groups, 2 x 2 parts."""
    input = torch.arange(16.0, device=device, dtype=torch.float64).expand(1, 16, 12, 16)
    rois = torch.tensor([[0.0, 4, 2, 10, 8]], device=device, dtype=torch.float64)
    offset = torch.zeros(1, 4, 2, 2, device=device, dtype=torch.float64)
    offset[0, 2, 0, 1] = 1.0
    output = operator(input, rois, offset, output_size=2, group_size=2)[0]
    expected = torch.tensor([5.0, 8.0], device=device).double().expand(4, 2, 2).clone()
    expected[2:, 0, 1] += 0.1 * 6
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@BOTH
def test_defaults(device: str, operator: Operator) -> None:
    input = random(1, 98, 10, 11, dtype=torch.float64, device=device)
    rois = torch.tensor([[0.0, 1.2, 2.1, 9.3, 8.4]], device=device, dtype=torch.float64)
    offset = random(1, 4, 7, 7, dtype=torch.float64, device=device)
    spelt_out = operator(input, rois, offset, 7, 7, 1.0, 4, 0.1, True)
    assert spelt_out.shape == (1, 2, 7, 7)
    assert torch.equal(operator(input, rois, offset), spelt_out)


# Boxes are pooled sixteen at a time, eight neighbours of a row at a time; those with bins of more
# than 24 cells or 16 samples along an axis on their own.
SHAPES: dict[str, dict[str, Any]] = {
    "37 boxes of three pictures": {"rois": 37, "batch": 3},
    "16 boxes": {"rois": 16, "batch": 1},
    "rows of 8": {"rois": 9, "size": (9, 8)},
    "rows of 9": {"rois": 9, "size": (5, 9)},
    "rows of 5": {"rois": 9, "size": (12, 5)},
    "bins of two and three chunks": {"rois": 33, "size": (37, 45), "sampling_ratio": 4},
    "bins of all sizes": {"rois": 33, "size": (70, 90), "output_size": 2, "sampling_ratio": 4},
    "gaps between samples": {"rois": 33, "size": (40, 41), "sampling_ratio": 2},
    "16 samples": {"rois": 5, "size": (20, 30), "sampling_ratio": 16},
    "17 samples": {"rois": 5, "size": (20, 30), "sampling_ratio": 17},
    "576 bins": {"rois": 18, "output_size": 24, "sampling_ratio": 1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_packs_match_reference(
    device: str,
    shape: dict[str, Any],
    aligned: bool,
    format: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    arguments = make_arguments("deform_ps_roi_pool", device, dtype, aligned=aligned, **shape)
    arguments["input"] = arguments["input"].to(memory_format=format)
    assert_matches(deform_ps_roi_pool, reference.deform_ps_roi_pool, arguments)


# Eight classes or more that share an offset are pooled together, up to 32 at a time; of a
# channels-last map, neighbouring positions are laid out together; its gradient is made a few lines
# of the map at a time, as many as the tallest bin reads.
SHARED: dict[str, dict[str, Any]] = {
    "8 classes": {"out_channels": 8},
    "40 classes of three pictures": {"out_channels": 40, "batch": 3, "rois": 9},
    "two offsets for 9 classes each": {"out_channels": 18, "class_groups": 2},
    "7x7 positions": {"out_channels": 21, "group_size": 7, "output_size": 7, "rois": 3},
    "more bins than positions": {"out_channels": 9, "group_size": 3, "output_size": (4, 5)},
    "17 samples": {"out_channels": 8, "size": (20, 30), "sampling_ratio": 17},
    "rigid": {"out_channels": 33, "class_groups": None},
    "some lines of the map at a time": {"out_channels": 9, "size": (40, 6), "output_size": 7},
    "lines that no bin reads": {"out_channels": 9, "size": (90, 5), "rois": 2, "output_size": 9},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHARED.values(), ids=SHARED.keys())
def test_classes_that_share_offsets_match_reference(
    device: str, shape: dict[str, Any], format: torch.memory_format, dtype: torch.dtype
) -> None:
    shape = {"class_groups": 1, **shape}
    arguments = make_arguments("deform_ps_roi_pool", device, dtype, **shape)
    arguments["input"] = arguments["input"].to(memory_format=format)
    assert_matches(deform_ps_roi_pool, reference.deform_ps_roi_pool, arguments)


@pytest.mark.parametrize("sampling_ratio", [4, 17])
def test_cells_that_no_sample_reads_may_hold_nan(device: str, sampling_ratio: int) -> None:
    """Columns of NaN right of the boxes, a row of NaN below; and nothing is added to either."""
    input = torch.ones(1, 1, 12, 31, device=device)
    input[..., 20:] = float("nan")
    input[..., 10, :] = float("nan")
    rois = torch.tensor([[0.0, 0, 0, width, 9] for width in (3, 9, 19)], device=device)
    offset = torch.zeros(3, 2, 1, 1, device=device, requires_grad=True)
    output = deform_ps_roi_pool(
        input.requires_grad_(), rois, offset, 1, 1, sampling_ratio=sampling_ratio
    )
    torch.testing.assert_close(output.detach(), torch.ones_like(output))
    output.sum().backward()
    assert input.grad is not None and offset.grad is not None
    assert offset.grad.isfinite().all()
    assert input.grad[..., 20:].eq(0).all() and input.grad[..., 10:, :].eq(0).all()
    torch.testing.assert_close(input.grad.sum(), torch.tensor(3.0, device=device))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"group_size": 3}, r"input|group_size"),
        ({"group_size": 0}, r"group_size"),
        ({"group_size": -2}, r"group_size"),
    ],
    ids=str,
)
def test_wrong_group_size_is_named(device: str, changes: dict[str, Any], named: str) -> None:
    arguments = make_arguments("deform_ps_roi_pool", device)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b({named})\b"):
        deform_ps_roi_pool(**{**arguments, **changes})
