"""torch.compile of the operators: one graph for all sizes, the same numbers and gradients."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

SIZES = [(2, 5, 7, 3), (3, 8, 6, 4), (4, 9, 11, 2)]  # pictures, rows, columns, boxes


def convolve(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, padding=1, mask=mask)


def pool(x: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
    return deform_roi_pool(x, rois, offset, 3, 0.5)


def pool_by_position(x: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
    return deform_ps_roi_pool(x, rois, offset, 3, 2, 0.5)


def convolution_inputs(n: int, h: int, w: int, boxes: int) -> list[Tensor]:
    shapes = [(n, 4, h, w), (n, 18, h, w), (n, 9, h, w), (6, 4, 3, 3)]
    return [torch.randn(shape) for shape in shapes]


def pooling_inputs(n: int, h: int, w: int, boxes: int) -> list[Tensor]:
    corners = torch.rand(boxes, 2, 2).cumsum(1).flatten(1) * min(h, w)
    rois = torch.cat([torch.randint(0, n, (boxes, 1)).float(), corners], dim=1)
    return [torch.randn(n, 8, h, w), rois, torch.randn(boxes, 2, 3, 3)]


def run(function, inputs, dynamic):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    for tensor, dimensions in zip(leaves, dynamic, strict=True):
        torch._dynamo.maybe_mark_dynamic(tensor, dimensions)
    output = function(*leaves)
    output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "function, make_inputs, dynamic",
    [
        (convolve, convolution_inputs, [[0, 2, 3]] * 3 + [[]]),
        (pool, pooling_inputs, [[0, 2, 3], [0], [0]]),
        (pool_by_position, pooling_inputs, [[0, 2, 3], [0], [0]]),
    ],
)
def test_one_graph_for_all_sizes(function, make_inputs, dynamic, autocast):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size in SIZES:
        inputs = make_inputs(*size)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected, actual = run(function, inputs, dynamic), run(compiled, inputs, dynamic)
        assert expected[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert counter.frame_count == 1
