"""What the operators' tests share: random arguments, runs with gradients, comparison, opcheck."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Operator = Callable[..., Tensor]

ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# Largest error against float64 as a part of the largest expected magnitude. float32: coordinates
# near 10 carry rounding of 1e-6, which the slope between neighbours multiplies. Half precision:
# four roundings (the result's, the sampled values' before the matrix product, some slack).
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4 * 2.0**-10,
    torch.bfloat16: 4 * 2.0**-7,
}

# Not finite, beyond int64, beyond int32, and the neighbours of what float32 takes for an integer.
WILD_NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e10, -3e9]


def random(*shape: int, dtype: torch.dtype, device: str, spread: float = 1.0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64) * spread
    return values.to(dtype=dtype, device=device)


def output_gradient(output: Tensor) -> Tensor:
    """An uneven gradient of the output that every dtype holds exactly."""
    steps = torch.arange(output.numel(), device=output.device) * 5 % 7
    return ((steps - 3) / 4).reshape(output.shape).to(output.dtype)


def run(
    operator: Operator, arguments: Arguments, wanted: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of `wanted`, by default of all floating tensors but `rois`."""
    names = [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "rois" and (wanted is None or name in wanted)
    ]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    output = operator(**{**arguments, **leaves})
    gradients = torch.autograd.grad(output, list(leaves.values()), output_gradient(output))
    return output.detach(), dict(zip(names, gradients, strict=True))


def in_double(arguments: Arguments) -> Arguments:
    return {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    assert actual.shape == expected.shape, what
    assert bool(actual.isfinite().all()), f"{what} is not finite"
    assert bool(expected.isfinite().all()), f"expected {what} is not finite"
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=0.0,
        atol=tolerance * largest,
        msg=lambda text: f"{what}: {text}",
    )


def assert_matches(operator: Operator, reference: Operator, arguments: Arguments) -> None:
    """Output and gradients equal those of the reference in float64, from the same numbers."""
    output, gradients = run(operator, arguments)
    expected_output, expected_gradients = run(reference, in_double(arguments))
    tolerance = TOLERANCE[arguments["input"].dtype]
    assert output.dtype == arguments["input"].dtype
    assert_near(output, expected_output, tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        assert_near(gradient, expected_gradients[name], tolerance, f"gradient of {name}")


def assert_bit_equal(
    first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert torch.equal(first[0], second[0]), "output"
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), f"gradient of {name}"


def run_with_threads(
    threads: int, operator: Operator, arguments: Arguments
) -> tuple[Tensor, dict[str, Tensor]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(operator, arguments)
    finally:
        torch.set_num_threads(before)


def cloned_leaves(arguments: Arguments, names: Iterable[str]) -> Arguments:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    return {**arguments, **leaves}


def registered_arguments(name: str, arguments: Arguments) -> tuple[Any, ...]:
    """`arguments` in the order of the schema of `torch.ops.d2_deform.<name>`."""
    schema = getattr(torch.ops.d2_deform, name).default._schema
    return tuple(arguments[argument.name] for argument in schema.arguments)


def changed(**changes: Any) -> Callable[[Arguments], Arguments]:
    """Makes the arguments that differ: each change is a new value, or a function of the old one."""
    return lambda arguments: {
        name: change(arguments[name]) if callable(change) else change
        for name, change in changes.items()
    }
