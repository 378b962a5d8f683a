"""Deformable RoI pooling: numbers by hand, and torchvision's. The rest is in test_pooling.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from d2_deform.ops import deform_roi_pool, reference

from .helpers import Operator, assert_near, random
from .pooling import random_rois

pytestmark = pytest.mark.parametrize(
    "operator",
    [
        pytest.param(deform_roi_pool, id="compiled"),
        pytest.param(reference.deform_roi_pool, id="reference"),
    ],
)


def ramp(height: int, width: int, device: str) -> Tensor:
    """Two channels: the cell's x and its y, which every bilinear sample returns exactly."""
    y = torch.arange(height, device=device, dtype=torch.float64)
    x = torch.arange(width, device=device, dtype=torch.float64)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def pooled(operator: Operator, box: tuple[float, ...], device: str, **options: Any) -> Tensor:
    """(2, Ph, Pw): mean x and mean y of the samples of each bin of one box on a 12x16 map."""
    rois = torch.tensor([[0.0, *box]], device=device, dtype=torch.float64)
    return operator(ramp(12, 16, device), rois, **options)[0]


def assert_positions(output: Tensor, x: list[float], y: list[float]) -> None:
    columns = torch.tensor(x, device=output.device, dtype=output.dtype)
    rows = torch.tensor(y, device=output.device, dtype=output.dtype)
    expected = torch.stack([columns.expand(len(y), len(x)), rows[:, None].expand(len(y), len(x))])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_aligned_bins_have_their_mean_in_their_centre(device: str, operator: Operator) -> None:
    # In cells x runs from 0.5 to 6.5, y from 1 to 9.
    output = pooled(operator, (2, 3, 14, 19), device, output_size=(4, 3), spatial_scale=0.5)
    assert_positions(output, x=[1.5, 3.5, 5.5], y=[2.0, 4.0, 6.0, 8.0])


def test_release_rounds_adds_a_pixel_and_samples_the_corners(
    device: str, operator: Operator
) -> None:
    # x: round(2.4) / 2 - 0.5 = 0.5 to (round(12.6) + 1) / 2 - 0.5 = 6.5; y: 1 to 9. Bins of 3 and
    # 4 cells, whose four samples have their mean at 3/8.
    output = pooled(
        operator,
        (2.4, 2.6, 12.6, 18.4),
        device,
        output_size=2,
        spatial_scale=0.5,
        aligned=False,
    )
    assert_positions(output, x=[0.5 + 1.125, 3.5 + 1.125], y=[1 + 1.5, 5 + 1.5])


@pytest.mark.parametrize(
    ("corner", "start"), [(2.5, 3.0), (3.5, 4.0), (4.5, 5.0), (0.5, 1.0), (2.49, 2.0)]
)
def test_release_rounds_halves_away_from_zero(
    device: str, operator: Operator, corner: float, start: float
) -> None:
    output = pooled(
        operator,
        (corner, corner, 9, 9),
        device,
        output_size=1,
        sampling_ratio=1,
        aligned=False,
    )
    assert_positions(output, x=[start - 0.5], y=[start - 0.5])


def test_release_rounds_negative_halves_away_from_zero(device: str, operator: Operator) -> None:
    # From -3.5 to 4.5 with 4 samples: -3.5, -1.5, 0.5, 2.5. From -2 it would be another 0.625.
    output = pooled(operator, (-2.5, -2.5, 4, 4), device, output_size=1, aligned=False)
    assert_positions(output, x=[1.5], y=[1.5])


def test_samples_outside_are_left_out_of_the_mean(device: str, operator: Operator) -> None:
    # x from -2.5 to 1.5: samples -2, -1, 0, 1, of which two count. y from 9.5 to 13.5: 10, 11, 12,
    # 13, likewise.
    output = pooled(operator, (-2, 10, 2, 14), device, output_size=1)
    assert_positions(output, x=[0.5], y=[10.5])


def test_samples_within_half_a_cell_of_the_border_are_clamped(
    device: str, operator: Operator
) -> None:
    # x from -1 to 1: samples -0.75, -0.25, 0.25, 0.75; the first is outside, the second reads 0.
    # y from 10.5 to 12.5: 10.75, 11.25, 11.75, 12.25; the last two are outside, 11.25 reads 11.
    output = pooled(operator, (-0.5, 11, 1.5, 13), device, output_size=1)
    assert_positions(output, x=[1 / 3], y=[10.875])


def test_the_border_itself_counts(device: str, operator: Operator) -> None:
    # The release's first sample of a box at 0 lies at -0.5 exactly, and reads cell 0.
    output = pooled(operator, (0, 0, 3, 3), device, output_size=1, sampling_ratio=2, aligned=False)
    assert_positions(output, x=[0.75], y=[0.75])
    # One sample, at 15.5 = W - 0.5 and 11.5 = H - 0.5, and one a little further.
    assert_positions(
        pooled(operator, (15, 11, 17, 13), device, output_size=1, sampling_ratio=1), [15.0], [11.0]
    )
    assert_positions(
        pooled(operator, (15, 11, 17.01, 13), device, output_size=1, sampling_ratio=1), [0.0], [0.0]
    )


def test_smallest_box(device: str, operator: Operator) -> None:
    # 0.1 cells wide and high, from (4.5, 2.5) on.
    for last in (5.0, 3.0, 5.05):
        output = pooled(operator, (5, 3, last, last - 2), device, output_size=(1, 2))
        assert_positions(output, x=[4.525, 4.575], y=[2.55])


@pytest.mark.parametrize("aligned", [True, False])
def test_offset_moves_a_bin_by_its_share_of_the_box(
    device: str, operator: Operator, aligned: bool
) -> None:
    options: dict[str, Any] = {"output_size": (2, 3), "gamma": 0.2, "aligned": aligned}
    box = (3.0, 2.0, 9.0, 6.0) if aligned else (3.0, 2.0, 8.0, 5.0)
    rigid = pooled(operator, box, device, **options)
    offset = torch.zeros(1, 2, 2, 3, device=device, dtype=torch.float64)
    offset[0, 0, 1, 2] = -0.5
    offset[0, 1, 1, 2] = 0.75
    offset[0, 1, 0, 0] = -1.0
    moved = pooled(operator, box, device, offset=offset, **options)
    expected = rigid.clone()
    expected[0, 1, 2] += -0.5 * 0.2 * 6  # x, the box's width
    expected[1, 1, 2] += 0.75 * 0.2 * 4  # y, its height
    expected[1, 0, 0] += -1.0 * 0.2 * 4
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_offset_groups_move_their_own_channels(device: str, operator: Operator) -> None:
    input = ramp(12, 16, device)[:, :1].repeat(1, 6, 1, 1)
    rois = torch.tensor([[0.0, 3, 2, 9, 6]], device=device, dtype=torch.float64)
    offset = torch.zeros(1, 6, 1, 1, device=device, dtype=torch.float64)
    offset[0, 0::2, 0, 0] = torch.tensor([0.0, 1.0, -2.0], device=device)
    output = operator(input, rois, offset, output_size=1)
    expected = 5.5 + 0.6 * torch.tensor([0.0, 0, 1, 1, -2, -2], device=device).double()
    torch.testing.assert_close(output.flatten(), expected, rtol=0, atol=1e-12)


def test_images_are_told_apart(device: str, operator: Operator) -> None:
    input = torch.arange(3.0, device=device).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    rois = torch.tensor([[2.0, 0, 0, 4, 4], [0, 1, 1, 3, 3], [1, 0, 1, 2, 3]], device=device)
    output = operator(input, rois, output_size=1)
    assert output.flatten().tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("position", "value", "slope"),
    [
        (-0.25, 2.0, 0.0),  # clamped
        (0.0, 2.0, 3.0),
        (0.5, 3.5, 3.0),
        (1.0, 5.0, 4.0),
        (1.75, 8.0, 4.0),
        (2.0, 9.0, 0.0),
        (2.25, 9.0, 0.0),  # clamped
        (2.75, 0.0, 0.0),  # outside
    ],
)
@pytest.mark.parametrize("axis", ["y", "x"])
@pytest.mark.parametrize("aligned", [True, False])
def test_slopes_by_hand(
    device: str,
    operator: Operator,
    aligned: bool,
    axis: str,
    position: float,
    value: float,
    slope: float,
) -> None:
    """One sample at `position` of three cells 2, 5, 9; the box is 2 cells wide and high."""
    if not aligned and position.is_integer():
        slope = 0.0
    cells = torch.tensor([2.0, 5.0, 9.0], device=device, dtype=torch.float64)
    shape = (1, 1, 3, 1) if axis == "y" else (1, 1, 1, 3)
    # In pixels of a quarter cell; across the axis the sample lies at cell 0. The sample is the
    # box's centre, or its corner.
    along, across = position * 4 + 2, 2.0
    sample = torch.tensor([across, along] if axis == "y" else [along, across])
    box = torch.cat([sample - 4, sample + 4]) if aligned else torch.cat([sample, sample + 7])
    rois = torch.cat([torch.zeros(1), box])[None].to(device, torch.float64)
    offset = torch.zeros(1, 2, 1, 1, device=device, dtype=torch.float64, requires_grad=True)
    output = operator(
        cells.reshape(shape),
        rois,
        offset,
        output_size=1,
        spatial_scale=0.25,
        sampling_ratio=1,
        gamma=0.5,
        aligned=aligned,
    )
    assert output.item() == value
    output.backward()
    assert offset.grad is not None
    channel = 1 if axis == "y" else 0
    assert offset.grad[0, channel].item() == slope * 0.5 * 2
    assert offset.grad[0, 1 - channel].item() == 0


def test_gradient_of_input_is_spread_over_the_kept_samples(device: str, operator: Operator) -> None:
    # Samples at -1, 0, 1 and 2 of a row of two cells: two kept, each half of the mean.
    input = torch.zeros(1, 1, 1, 2, device=device, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.0, -1, 0, 3, 1]], device=device, dtype=torch.float64)
    operator(input, rois, output_size=1).backward()
    assert input.grad is not None
    torch.testing.assert_close(input.grad.flatten(), torch.full_like(input.flatten(), 0.5))


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("bins", [1, (3, 2), 7])
def test_rigid_is_roi_align_inside_the_map(
    device: str, operator: Operator, bins: int | tuple[int, int], ratio: int
) -> None:
    input = random(2, 5, 11, 13, dtype=torch.float64, device=device)
    rois = random_rois(20, 2, (11, 13), 0.5).to(device)
    rois[:, 1::2] = rois[:, 1::2].clamp(0, 26)
    rois[:, 2::2] = rois[:, 2::2].clamp(0, 22)
    expected = torchvision.ops.roi_align(input, rois, bins, 0.5, ratio, aligned=True)
    output = operator(input, rois, output_size=bins, spatial_scale=0.5, sampling_ratio=ratio)
    assert_near(output, expected, 1e-12)


def test_defaults(device: str, operator: Operator) -> None:
    input = random(1, 2, 14, 15, dtype=torch.float64, device=device)
    rois = torch.tensor([[0.0, 1.2, 2.1, 12.3, 11.4]], device=device, dtype=torch.float64)
    offset = random(1, 2, 7, 7, dtype=torch.float64, device=device)
    spelt_out = operator(input, rois, offset, 7, 1.0, 4, 0.1, True)
    assert spelt_out.shape == (1, 2, 7, 7)
    assert torch.equal(operator(input, rois, offset), spelt_out)
