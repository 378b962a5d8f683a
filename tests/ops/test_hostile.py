"""Properties that hold for whatever arguments: tools/sanitize.py tries many more of them.

The reference twins are run in the type that the operators compute in, so that both find the same
cells; `hostile.py` says why they agree to the last bit about borders.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .helpers import TOLERANCE, Arguments, Operator
from .hostile import OPERATORS, Draw, cases

Results = dict[str, Tensor]
each_operator = pytest.mark.parametrize("name", list(OPERATORS))
# The device stays the same for all examples of a test.
shares_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(operator: Operator, arguments: Arguments, wanted: list[str]) -> Results:
    """The output, and the gradients of `wanted` under their names."""
    given = {name: value for name, value in arguments.items() if name != "grad_output"}
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    output = operator(**{**given, **leaves})
    results = {"output": output.detach()}
    if wanted:
        gradients = torch.autograd.grad(output, list(leaves.values()), arguments["grad_output"])
        results.update(zip(wanted, gradients, strict=True))
    return results


def run_reference(name: str, arguments: Arguments, wanted: list[str]) -> Results:
    """The reference's results, from dense copies of the arguments in the type computed in, by one
    thread: torch's own float32 index_put adds in any order where it has several."""
    double = arguments["input"].dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    dense = {
        key: value.to(dtype, copy=True).contiguous() if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(OPERATORS[name][1], dense, wanted)
    finally:
        torch.set_num_threads(threads)


def differentiable(arguments: Arguments) -> list[str]:
    fixed = ("rois", "grad_output")
    return [k for k, v in arguments.items() if isinstance(v, Tensor) and k not in fixed]


def same(first: Tensor, second: Tensor) -> Tensor:
    """Where two results are equal, NaN being equal to NaN."""
    return (first == second) | (first.isnan() & second.isnan())


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Within the tolerance of `dtype`, for each first index beside its largest number, at least 1:
    a huge box makes huge gradients of its own offsets only."""
    assert actual.shape == expected.shape, what
    if actual.numel() == 0:
        return
    actual, expected = actual.double(), expected.to(actual.dtype).double()
    finite = torch.where(expected.isfinite(), expected, 0.0)
    largest = finite.abs().flatten(1).amax(1) if finite.dim() > 1 else finite.abs()
    bound = TOLERANCE[dtype] * largest.clamp(min=1.0).reshape(-1, *[1] * (actual.dim() - 1))
    wrong = ~(same(actual, expected) | ((actual - expected).abs() <= bound))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, the first is "
        f"{actual[wrong][0].item()}, expected {expected[wrong][0].item()}"
    )


@each_operator
@shares_device
@given(data=st.data())
def test_matches_reference(device: str, name: str, data: st.DataObject) -> None:
    arguments = data.draw(cases(name))
    names = differentiable(arguments)
    wanted = [key for key in names if data.draw(st.booleans(), label=f"gradient of {key}")]
    results = run(OPERATORS[name][0], arguments, wanted)
    expected = run_reference(name, arguments, wanted)
    for key, value in results.items():
        assert value.dtype == arguments["input" if key == "output" else key].dtype, key
        assert_near(value, expected[key], arguments["input"].dtype, key)


def of_offsets(bins: Tensor, offset: Tensor) -> Tensor:
    """From bins of all channels (R, C, Ph, Pw) to the offsets (R, 2 * K, Ph, Pw) that move them: a
    NaN times a slope of 0 may be NaN."""
    groups = offset.shape[1] // 2
    whole = torch.stack([part.all(dim=1) for part in bins.chunk(groups, dim=1)], dim=1)
    return whole.repeat_interleave(2, dim=1)


BAD_VALUES = [float("nan"), float("inf"), -float("inf"), 1e38, 1e10, -3e9, 1e-45]


@each_operator
@shares_device
@given(data=st.data())
def test_one_bad_number_stays_with_what_it_feeds(
    device: str, name: str, data: st.DataObject
) -> None:
    """What the reference computes bit for bit alike with and without it, so does the operator. And
    a NaN is not lost: what changes with the value that it replaces, becomes NaN."""
    arguments = data.draw(cases(name, bad_coordinates=False))
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.numel() > 0}
    assume(tensors)
    where = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    index = data.draw(st.integers(0, tensors[where].numel() - 1), label="element")
    bad = data.draw(st.sampled_from(BAD_VALUES), label="number")

    def with_number(change: float | None) -> Arguments:
        spoilt = tensors[where].clone(memory_format=torch.preserve_format)
        place = spoilt[
            tuple(int(i) for i in torch.unravel_index(torch.tensor(index), spoilt.shape))
        ]
        place += 1.0 if change is None else change - place
        return {**arguments, where: spoilt}

    spoilt = with_number(bad)
    clean = {**arguments, where: tensors[where].clone(memory_format=torch.preserve_format)}
    wanted = differentiable(arguments)
    results = [run(OPERATORS[name][0], each, wanted) for each in (clean, spoilt)]
    expected = [run_reference(name, each, wanted) for each in (clean, spoilt)]
    for key in results[0]:
        unfed = same(expected[0][key], expected[1][key])
        if key == "offset" and "rois" in arguments:
            bins = same(expected[0]["output"], expected[1]["output"])
            bins &= same(clean["grad_output"], spoilt["grad_output"])
            unfed &= of_offsets(bins, unfed)
        equal = same(results[0][key], results[1][key])
        assert not (unfed & ~equal).any(), f"{key}: changed by {where}, which does not feed it"
    if bad == bad or where in ("offset", "rois"):
        return
    changed = run_reference(name, with_number(None), wanted)
    for key in results[0]:
        fed = ~same(expected[0][key], changed[key])
        assert results[1][key][fed].isnan().all(), f"{key}: the NaN of {where} is lost"


MISFITS = ["shorter", "longer", "one dimension", "one dimension more", "transposed"]
MISFITS += ["empty", "integers", "complex numbers", "doubles", "none"]


@st.composite
def misfits(draw: Draw, value: Any) -> Any:
    """What takes the place of an argument: of its kind, seldom of its size."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([-(2**63), -1, 0, 1, 3, 2**40, 2**62]))
    if isinstance(value, float):
        return draw(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e308]))
    if value is None:
        return torch.zeros(draw(st.lists(st.integers(0, 3), max_size=5)))
    axis = draw(st.integers(0, value.dim() - 1))
    return {
        "shorter": value.narrow(axis, 0, value.shape[axis] // 2),
        "longer": torch.cat([value, value], dim=axis),
        "one dimension": value.reshape(-1),
        "one dimension more": value[None],
        "transposed": value.transpose(0, axis),
        "empty": value[:0],
        "integers": value.nan_to_num(0).clamp(-9, 9).long(),
        "complex numbers": value.to(torch.complex64),
        "doubles": value.double(),
        "none": None,
    }[draw(st.sampled_from(MISFITS))]


@each_operator
@pytest.mark.parametrize("suffix", ["", "_backward"], ids=["forward", "backward"])
@shares_device
@given(data=st.data())
def test_registered_operators_compute_or_refuse(
    device: str, name: str, suffix: str, data: st.DataObject
) -> None:
    """Called without the checks in Python, with one or two arguments that do not fit the others."""
    drawn = data.draw(cases(name))
    operator = getattr(torch.ops.d2_deform, name + suffix).default
    arguments = {
        argument.name: registered(drawn, argument.name) for argument in operator._schema.arguments
    }
    names = st.sampled_from(sorted(arguments))
    for key in data.draw(st.lists(names, min_size=1, max_size=2, unique=True)):
        arguments[key] = data.draw(misfits(arguments[key]), label=key)
    try:
        operator(*arguments.values())
    except (RuntimeError, TypeError, ValueError) as error:
        assert str(error)


def registered(arguments: Arguments, name: str) -> object:
    """An argument of a registered operator, from those of the public one."""
    for pair, short in (("stride", "stride"), ("padding", "pad"), ("dilation", "dilation")):
        if name in (f"{short}_h", f"{short}_w"):
            return arguments[pair][name.endswith("_w")]
    if name in ("pooled_h", "pooled_w"):
        return arguments["output_size"][name.endswith("_w")]
    if name.startswith("need_"):
        return name.removeprefix("need_") in ("bias", *arguments)
    return False if name == "deterministic" else arguments.get(name)
