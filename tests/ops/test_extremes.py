"""Sizes and values at which sums lose digits, indices overflow or nothing is left to read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool, reference

POOLS = {
    "deform_roi_pool": deform_roi_pool,
    "deform_ps_roi_pool": lambda *args, **kwargs: deform_ps_roi_pool(*args, group_size=1, **kwargs),
}


def conv_1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return deform_conv2d(x, x.new_zeros(x.shape[0], 2, *x.shape[2:]), weight, bias)


@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
def test_weight_gradient_of_many_pixels_keeps_its_digits(device: str, groups: int) -> None:
    """A million terms of one sign: one long float32 sum is off by 1e-3 and more."""
    x = torch.rand(1, 4, 1024, 1024, device=device)
    weight = torch.zeros(4, 4 // groups, 1, 1, device=device, requires_grad=True)
    output = conv_1x1(x, weight)
    grad = torch.rand_like(output)
    (got,) = torch.autograd.grad(output, weight, grad)
    pairs = torch.einsum("nohw,nchw->oc", grad.double(), x.double())
    expected = (pairs if groups == 1 else pairs.diag()[:, None])[:, :, None, None]
    assert ((got - expected) / expected).abs().max() < 2e-5


def test_bias_gradient_is_bit_equal_for_any_thread_count() -> None:
    x, weight = torch.rand(2, 2, 256, 256), torch.rand(1, 2, 1, 1)
    bias = torch.zeros(1, requires_grad=True)
    grad = torch.rand(2, 1, 256, 256)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results += torch.autograd.grad(conv_1x1(x, weight, bias), bias, grad)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], grad.sum().reshape(1))


def test_groups_that_are_almost_depthwise(device: str) -> None:
    """Two outputs for every input channel: no slice of channels may cross a group."""
    double = {"dtype": torch.float64, "device": device}
    x = torch.rand(2, 6, 7, 8, **double).requires_grad_()
    offset = torch.randn(2, 2 * 2 * 9, 5, 6, **double).requires_grad_()
    weight = torch.rand(12, 1, 3, 3, **double).requires_grad_()
    outputs = [f(x, offset, weight) for f in (deform_conv2d, reference.deform_conv2d)]
    grad = torch.rand_like(outputs[0])
    gradients = [torch.autograd.grad(o, (x, offset, weight), grad) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("operator", [deform_conv2d, reference.deform_conv2d])
def test_nan_in_the_mask_of_a_tap_outside_the_map_is_nobodys(device: str, operator) -> None:
    x, weight = torch.rand(1, 2, 4, 4, device=device), torch.rand(2, 2, 1, 1, device=device)
    offset = torch.zeros(1, 2, 4, 4, device=device)
    offset[0, :, 1, 2] = 100.0
    mask = torch.ones(1, 1, 4, 4, device=device)
    clean = operator(x, offset, weight, mask=mask)
    mask[0, 0, 1, 2] = float("nan")
    leaves = [t.requires_grad_() for t in (x, offset, weight)]
    output = operator(*leaves, mask=mask)
    assert torch.equal(output, clean)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_axis_longer_than_float32_can_count(device: str, pool) -> None:
    """Beyond 2**24 cells neighbouring numbers are one; a sample must still lie in the map."""
    length = 2**24 + 4
    x = torch.ones(1, 1, 1, length, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, length, 0.0, length, 1.0]], device=device)
    output = pool(x, rois, output_size=1, sampling_ratio=1)
    assert output.item() in (0.0, 1.0)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.sum() == output.item()


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_many_samples_need_no_more_room_than_the_map(device: str, pool) -> None:
    double = {"dtype": torch.float64, "device": device}
    x = torch.rand(1, 1, 5, 6, **double)
    rois = torch.tensor([[0.0, 0.5, 0.5, 5.5, 4.5]], **double)
    output = pool(x, rois, output_size=1, sampling_ratio=20000)
    # The mean over the box's area of the bilinear surface: ends of the axes count half.
    y = torch.tensor([0.5, 1, 1, 1, 0.5], **double) / 4
    along_x = torch.tensor([0.5, 1, 1, 1, 1, 0.5], **double) / 5
    torch.testing.assert_close(output.item(), (y @ x[0, 0] @ along_x).item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=str)
def test_empty_map_is_refused(size: tuple[int, int]) -> None:
    x, rois = torch.zeros(1, 1, *size), torch.zeros(1, 5)
    offset = torch.zeros(1, 2, *(length + 2 for length in size))
    with pytest.raises(ValueError, match="input: expected shape"):
        deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), padding=1)
    for pool in POOLS.values():
        with pytest.raises(ValueError, match="input: expected shape"):
            pool(x, rois)


def test_arguments_that_are_no_numbers_are_named() -> None:
    x, rois = torch.rand(1, 1, 4, 4), torch.zeros(1, 5)
    with pytest.raises(TypeError, match="stride: expected an int, got None"):
        deform_conv2d(x, torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 1, 1), stride=None)
    for pool in POOLS.values():
        with pytest.raises(TypeError, match="sampling_ratio: expected an int, got True"):
            pool(x, rois, sampling_ratio=True)
        with pytest.raises(ValueError, match="sampling_ratio: expected at most 65536"):
            pool(x, rois, sampling_ratio=65537)
        with pytest.raises(ValueError, match="input: expected shape"):
            pool(torch.zeros(5), rois)


def test_kernels_check_what_they_would_crash_on(device: str) -> None:
    """The registered operators can be called without the checks in Python."""
    operators = torch.ops.d2_deform
    x, rois = torch.rand(1, 1, 4, 4, device=device), torch.zeros(1, 5, device=device)
    with pytest.raises(RuntimeError, match="group_size"):
        operators.deform_ps_roi_pool(x, rois, None, 1, 1, 2**32, 1.0, 1, 0.1, True)
    with pytest.raises(RuntimeError, match="sampling_ratio"):
        operators.deform_roi_pool(x, rois, None, 1, 1, 1.0, 2**40, 0.1, True)
    geometry = (2, 2, 0, 0, 1, 1)
    offset = torch.zeros(1, 18, 1, 1, device=device)
    weight = torch.ones(1, 1, 3, 3, device=device)
    with pytest.raises(RuntimeError, match="no output is left"):
        operators.deform_conv2d(x[:, :, :2, :2], offset, weight, None, None, *geometry)
