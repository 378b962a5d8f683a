"""Maps too large to be laid out whole are convolved band by band, with the same results."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from d2_deform.ops import deform_conv2d, reference

SIZE = (160, 170)  # with 160 channels of float32, 80 of float64, more than is laid out at a time


def problem(dtype, channels, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, *size, dtype=dtype, generator=generator)
    offset = 2 * torch.randn(1, 18, *size, dtype=dtype, generator=generator)
    weight = torch.randn(3, channels, 3, 3, dtype=dtype, generator=generator)
    return [t.requires_grad_() for t in (x, offset, weight)]


@pytest.mark.parametrize("far", [False, True])
def test_large_map(far):
    x, offset, weight = problem(torch.float32, 160, SIZE)
    if far:  # a band that samples the whole map: the map is laid out whole
        offset.data[0, 0, 80] = torch.linspace(-85, 85, SIZE[1])
    output = deform_conv2d(x, offset, weight, padding=1)
    # Channels-last maps are read where they lie: never in bands.
    in_place = x.detach().contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, deform_conv2d(in_place, offset, weight, padding=1))


def test_large_map_backward():
    inputs = problem(torch.float64, 80, SIZE)
    outputs = [
        operator(*inputs, padding=1) for operator in (deform_conv2d, reference.deform_conv2d)
    ]
    grad = torch.randn_like(outputs[0])
    pairs = zip(*(torch.autograd.grad(output, inputs, grad) for output in outputs), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 4])
def test_equals_reference(rows):
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "D2_DEFORM_CPU_BAND_ROWS": str(rows)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def compare(x, offset, weight, bias, mask, **geometry):
    """With the twin; and the output with that of a map which is read where it lies."""
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, mask) if t is not None]
    outputs = [
        operator(x, offset, weight, bias, mask=mask, **geometry)
        for operator in (deform_conv2d, reference.deform_conv2d)
    ]
    in_place = x.detach().contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        outputs[0], deform_conv2d(in_place, offset, weight, bias, mask=mask, **geometry)
    )
    grad = torch.randn_like(outputs[0])
    pairs = zip(*(torch.autograd.grad(output, inputs, grad) for output in outputs), strict=True)
    for got, expected in [tuple(outputs), *pairs]:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def compare_all():
    torch.manual_seed(0)
    for channels, groups, deform_groups in ((5, 1, 1), (140, 1, 2), (12, 3, 2), (36, 36, 2)):
        for stride, dilation, spread in product((1, 2), (1, 3), (0.5, 30.0)):
            x = torch.randn(2, channels, 13, 11).double()
            size = [(n + 2 - 2 * dilation - 1) // stride + 1 for n in x.shape[2:]]
            offset = spread * torch.randn(2, 18 * deform_groups, *size).double()
            offset[0, :, 1] = 1e9  # rows that read nothing
            weight = torch.randn(36, channels // groups, 3, 3).double()
            bias, mask = torch.randn(36).double(), torch.rand(2, 9 * deform_groups, *size).double()
            geometry = {"stride": stride, "padding": 1, "dilation": dilation}
            compare(x, offset, weight, bias, mask, **geometry)
            compare(x, offset, weight, None, None, **geometry)


if __name__ == "__main__":
    compare_all()
