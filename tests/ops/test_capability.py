"""Every instruction set that this processor has computes what the reference twins compute."""

import os
import subprocess
import sys

import pytest
import torch

from d2_deform.ops import (
    cpu_capability,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    reference,
)

SETS = ["default", "avx2", "avx512"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def run_with(capability, *command):
    """Runs this file's checks in a process of its own: the set is chosen once, at loading."""
    return subprocess.run(
        [sys.executable, *(command or [__file__])],
        env={**os.environ, "D2_DEFORM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def best():
    """The processor's, also where these tests are made to run with less."""
    code = "from d2_deform.ops import cpu_capability; print(cpu_capability())"
    return run_with("", "-c", code).stdout.strip()


@pytest.mark.parametrize("capability", SETS)
def test_equals_reference(capability, best):
    if SETS.index(capability) > SETS.index(best):
        result = run_with(capability)
        assert result.returncode != 0
        assert f"D2_DEFORM_CPU_CAPABILITY={capability}: this processor has no more" in result.stderr
        return
    result = run_with(capability)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == capability


def test_unknown_set_is_named():
    result = run_with("sse9")
    assert result.returncode != 0
    assert "D2_DEFORM_CPU_CAPABILITY=sse9: expected default, avx2 or avx512" in result.stderr


def compare(operator, twin, inputs):
    inputs = [t.requires_grad_() for t in inputs]
    outputs = [f(*inputs) for f in (operator, twin)]
    grad = torch.randn_like(outputs[0])
    pairs = zip(*(torch.autograd.grad(o, inputs, grad) for o in outputs), strict=True)
    for got, expected in [tuple(outputs), *pairs]:
        scale = max(expected.abs().max().item(), 1.0)
        tolerance = TOLERANCE[expected.dtype] * scale
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def compare_conv(dtype, channels, out_channels, kernel, groups, deform_groups):
    size, taps = (11, 13), kernel[0] * kernel[1]
    out = [length - side + 1 for length, side in zip(size, kernel, strict=True)]
    x = torch.randn(2, channels, *size, dtype=dtype)
    offset = 2 * torch.randn(2, 2 * deform_groups * taps, *out, dtype=dtype)
    weight = torch.randn(out_channels, channels // groups, *kernel, dtype=dtype)
    bias = torch.randn(out_channels, dtype=dtype)
    mask = torch.rand(2, deform_groups * taps, *out, dtype=dtype)

    def call(function):
        return lambda x, o, w, b, m: function(x, o, w, b, mask=m)

    compare(call(deform_conv2d), call(reference.deform_conv2d), [x, offset, weight, bias, mask])


def compare_pooling(dtype, channels, offset_groups):
    corners = torch.rand(9, 2, dtype=dtype) * 80
    image = torch.randint(0, 2, (9, 1)).to(dtype)
    rois = torch.cat([image, corners, corners + 100 * torch.rand(9, 2, dtype=dtype)], dim=1)
    offset = torch.randn(9, 2 * offset_groups, 3, 3, dtype=dtype)
    rule = {"output_size": 3, "spatial_scale": 1 / 8}
    ps_rule = {**rule, "group_size": 3}
    for operator, twin, maps, more in (
        (deform_roi_pool, reference.deform_roi_pool, channels, rule),
        (deform_ps_roi_pool, reference.deform_ps_roi_pool, 9 * channels, ps_rule),
    ):
        x = torch.randn(2, maps, 10, 12, dtype=dtype)
        compare(
            lambda x, o, f=operator, m=more: f(x, rois, o, **m),
            lambda x, o, f=twin, m=more: f(x, rois, o, **m),
            [x, offset],
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        # Widths around a panel and a register of each set; one output row that fills no block.
        for channels, out_channels in ((1, 1), (7, 5), (32, 33), (66, 40)):
            compare_conv(dtype, channels, out_channels, (3, 2), groups=1, deform_groups=1)
        compare_conv(dtype, 36, 36, (3, 3), groups=36, deform_groups=2)
        compare_conv(dtype, 24, 16, (1, 1), groups=2, deform_groups=3)
        for channels, offset_groups in ((6, 1), (70, 2), (4, 4)):
            compare_pooling(dtype, channels, offset_groups)
    print(cpu_capability())
