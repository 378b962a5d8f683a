from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from d2_deform.ops import deform_conv2d, reference

from .helpers import (
    ALL_DTYPES,
    TOLERANCE,
    WILD_NUMBERS,
    Arguments,
    Operator,
    assert_bit_equal,
    assert_matches,
    assert_near,
    changed,
    cloned_leaves,
    random,
    registered_arguments,
    run,
    run_with_threads,
)

TENSORS = ("input", "offset", "weight", "bias", "mask")
IMPLEMENTATIONS = [
    pytest.param(deform_conv2d, id="compiled"),
    pytest.param(reference.deform_conv2d, id="reference"),
]


def make_arguments(
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    channels: int = 6,
    out_channels: int = 2,
    groups: int = 2,
    offset_groups: int = 3,
    kernel: tuple[int, int] = (3, 2),
    size: tuple[int, int] = (7, 9),
    stride: int | tuple[int, int] = (2, 1),
    padding: int | tuple[int, int] = (1, 0),
    dilation: int | tuple[int, int] = (2, 1),
    modulated: bool = True,
    biased: bool = True,
    coordinate_dtype: torch.dtype | None = None,
    spread: float = 1.5,
) -> Arguments:
    """Asymmetric in everything, unless told otherwise."""
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    out_size = tuple(
        (size[i] + 2 * pairs[1][i] - pairs[2][i] * (kernel[i] - 1) - 1) // pairs[0][i] + 1
        for i in (0, 1)
    )
    taps = offset_groups * kernel[0] * kernel[1]
    coordinates: dict[str, Any] = {"dtype": coordinate_dtype or dtype, "device": device}
    features: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "input": random(batch, channels, *size, **features),
        "offset": random(batch, 2 * taps, *out_size, spread=spread, **coordinates),
        "weight": random(out_channels, channels // groups, *kernel, **features),
        "bias": random(out_channels, **features) if biased else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": random(batch, taps, *out_size, **coordinates) if modulated else None,
    }


SAME: dict[str, Any] = {"kernel": (3, 3), "stride": 1, "padding": 1, "dilation": 1}
POINT: dict[str, Any] = {
    "kernel": (1, 1),
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "offset_groups": 1,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "asymmetric": {},
    "without mask": {"modulated": False},
    "without bias": {"biased": False},
    "without both": {"modulated": False, "biased": False},
    "batch 0": {"batch": 0},
    "batch 1": {"batch": 1},
    "batch 33": {"batch": 33, "size": (5, 4)},
    "batch 65": {"batch": 65, "size": (5, 2)},
    "1x1": POINT,
    "1x1 strided": {**POINT, "stride": (3, 2)},
    "2x2": {"kernel": (2, 2), "padding": (1, 1), "dilation": (1, 1), "stride": (1, 1)},
    "4x4": {"kernel": (4, 4), "padding": (2, 1), "dilation": (1, 2), "stride": (1, 2)},
    "5x5": {"kernel": (5, 5), "padding": 2, "dilation": 1, "stride": 1},
    "1x7": {"kernel": (1, 7), "padding": (0, 3), "dilation": 1, "stride": 1},
    "depthwise": {**SAME, "out_channels": 6, "groups": 6, "offset_groups": 1},
    "depthwise, own offsets": {**SAME, "out_channels": 6, "groups": 6, "offset_groups": 6},
    "depthwise, two outputs a channel": {**SAME, "out_channels": 12, "groups": 6},
    "17 to 19 channels": {
        **SAME,
        "size": (4, 5),
        "channels": 17,
        "out_channels": 19,
        "groups": 1,
        "offset_groups": 17,
    },
    "1 channel": {**SAME, "channels": 1, "out_channels": 1, "groups": 1, "offset_groups": 1},
    "3 to 16 channels": {**SAME, "channels": 3, "out_channels": 16, "groups": 1},
    "16 to 3 channels": {
        **SAME,
        "channels": 16,
        "out_channels": 3,
        "groups": 1,
        "offset_groups": 4,
    },
    "64 to 48 channels": {
        **SAME,
        "size": (4, 5),
        "channels": 64,
        "out_channels": 48,
        "groups": 1,
        "offset_groups": 4,
    },
    "48 to 80 channels in 4 groups": {
        **SAME,
        "size": (4, 5),
        "channels": 48,
        "out_channels": 80,
        "groups": 4,
        "offset_groups": 1,
    },
    "many pixels": {**SAME, "batch": 1, "size": (17, 19)},
    "map smaller than the kernel": {**SAME, "size": (2, 1)},
    "one output cell": {**SAME, "size": (3, 3), "padding": 0},
    "one row": {**SAME, "size": (1, 11)},
    "large padding": {**SAME, "padding": (4, 5)},
    "all taps near the border": {**SAME, "size": (2, 3), "spread": 3.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_matches_reference(device: str, configuration: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, **configuration)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_reference_matches_torchvision(configuration: dict[str, Any]) -> None:
    arguments = make_arguments(**configuration)
    output, gradients = run(reference.deform_conv2d, arguments)
    expected_output, expected_gradients = run(torchvision.ops.deform_conv2d, arguments)
    assert_near(output, expected_output, 1e-12)
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], 1e-12, f"gradient of {name}")


def test_matches_torchvision(device: str) -> None:
    arguments = make_arguments(device)
    output, gradients = run(deform_conv2d, arguments)
    expected_output, expected_gradients = run(torchvision.ops.deform_conv2d, arguments)
    assert_near(output, expected_output, 1e-12)
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], 1e-12, f"gradient of {name}")


@pytest.mark.parametrize("operator", [deform_conv2d, reference.deform_conv2d])
def test_signature_is_torchvisions(operator: Operator) -> None:
    def names_and_defaults(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert names_and_defaults(operator) == names_and_defaults(torchvision.ops.deform_conv2d)


@pytest.mark.parametrize("coordinates", ["features' dtype", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "configuration",
    ["asymmetric", "without both", "1x1", "depthwise", "17 to 19 channels", "64 to 48 channels"],
)
def test_half_precision_matches_double(
    device: str, configuration: str, dtype: torch.dtype, coordinates: str
) -> None:
    arguments = make_arguments(
        device,
        dtype,
        coordinate_dtype=torch.float32 if coordinates == "float32" else dtype,
        **CONFIGURATIONS[configuration],
    )
    arguments = {name: value for name, value in arguments.items() if value is not None}
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_coordinates_in_float32(device: str, dtype: torch.dtype) -> None:
    """From cell 1024 on, a quarter of a cell has no place in a half-precision coordinate."""
    width = 1100
    ramp = torch.arange(width, device=device) % 2
    offset = torch.zeros(1, 2, 1, width, device=device)
    offset[:, 1] = 0.25
    output = deform_conv2d(
        ramp.to(dtype).reshape(1, 1, 1, width),
        offset.to(dtype),
        torch.ones(1, 1, 1, 1, device=device, dtype=dtype),
    )
    inner = output[0, 0, 0, :-1].float()
    assert torch.equal(inner, torch.where(ramp[:-1] == 1, 0.75, 0.25))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(device: str, dtype: torch.dtype) -> None:
    """4096 + 1024 small terms: a running half-precision sum would stay at 4096."""
    channels = 1025
    input = torch.ones(1, channels, 1, 1, device=device, dtype=dtype)
    input[0, 0] = 4096
    weight = torch.ones(1, channels, 1, 1, device=device, dtype=dtype)
    output = deform_conv2d(input, torch.zeros(1, 2, 1, 1, device=device, dtype=dtype), weight)
    assert output.item() == 5120


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_half_a_cell_down_and_right(device: str, operator: Operator) -> None:
    """Detectron2's own numbers."""
    arguments = {
        "input": torch.arange(25.0, device=device).reshape(1, 1, 5, 5),
        "offset": torch.full((1, 18, 5, 5), 0.5, device=device),
        "weight": torch.ones(1, 1, 3, 3, device=device),
        "padding": 1,
    }
    expected = torch.tensor(
        [
            [30, 41.25, 48.75, 45, 28.75],
            [62.25, 81, 90, 80.25, 50.25],
            [99.75, 126, 135, 117.75, 72.75],
            [105, 131.25, 138.75, 120, 73.75],
            [71.75, 89.25, 93.75, 80.75, 49.5],
        ],
        device=device,
    )
    assert torch.equal(operator(**arguments)[0, 0], expected)
    mask = torch.full((1, 9, 5, 5), 0.5, device=device)
    assert torch.equal(operator(**arguments, mask=mask)[0, 0], expected / 2)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", ["y", "x"])
def test_border_by_hand(device: str, operator: Operator, axis: str) -> None:
    """Values and slopes along a map of three cells 2, 5, 8, read by one tap at each position."""
    table = [  # position, value, right-hand slope
        (-1.25, 0.0, 0.0),
        (-1.0, 0.0, 0.0),
        (-0.75, 0.5, 2.0),
        (0.0, 2.0, 3.0),
        (0.5, 3.5, 3.0),
        (1.0, 5.0, 3.0),
        (2.0, 8.0, -8.0),
        (2.75, 2.0, -8.0),
        (3.0, 0.0, 0.0),
        (3.25, 0.0, 0.0),
    ]
    position, value, slope = torch.tensor(table, device=device, dtype=torch.float64).unbind(1)
    count, along = len(table), 2 if axis == "y" else 3
    shape = (count, 1, 3, 1) if axis == "y" else (count, 1, 1, 3)
    cells = torch.tensor([2.0, 5.0, 8.0], device=device, dtype=torch.float64)
    cells = cells.reshape(shape[1:]).expand(shape)
    base = torch.arange(3, device=device).reshape(shape[1:])
    offset = torch.zeros(count, 2, *shape[2:], device=device, dtype=torch.float64)
    offset[:, along - 2] = (position[:, None, None, None] - base)[:, 0]
    offset.requires_grad_()
    output = operator(cells, offset, torch.ones(1, 1, 1, 1, device=device, dtype=torch.float64))
    assert torch.equal(output, value[:, None, None, None].expand(shape))
    output.sum().backward()
    assert offset.grad is not None
    expected = slope[:, None, None].expand(count, *shape[2:])
    assert torch.equal(offset.grad[:, along - 2], expected)
    assert torch.equal(offset.grad[:, 3 - along], -output.detach()[:, 0])


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("configuration", ["asymmetric", "4x4", "1x1", "depthwise", "1x7"])
def test_zero_offset_is_conv2d(device: str, operator: Operator, configuration: str) -> None:
    arguments = make_arguments(device, **{**CONFIGURATIONS[configuration], "modulated": False})
    arguments["offset"].zero_()
    groups = arguments["input"].size(1) // arguments["weight"].size(1)
    plain = {n: v for n, v in arguments.items() if n not in ("offset", "mask")}
    assert_near(operator(**arguments), F.conv2d(**plain, groups=groups), 1e-12)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("move", [(1, -2), (-3, 0), (0, 4), (-20, 1)], ids=str)
def test_integer_offset_is_shifted_conv2d(
    device: str, operator: Operator, move: tuple[int, int]
) -> None:
    arguments = make_arguments(device, modulated=False)
    arguments["offset"][:, 0::2], arguments["offset"][:, 1::2] = move
    pad_y, pad_x = arguments["padding"]
    shifted = F.pad(arguments["input"], (24, 24, 24, 24))
    shifted = shifted[
        :,
        :,
        24 - pad_y + move[0] : 24 + 7 + pad_y + move[0],
        24 - pad_x + move[1] : 24 + 9 + pad_x + move[1],
    ]
    expected = F.conv2d(
        shifted, arguments["weight"], arguments["bias"], (2, 1), dilation=(2, 1), groups=2
    )
    assert_near(operator(**arguments), expected, 1e-12)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_offsets_of_one_step_a_tap_are_dilation(device: str, operator: Operator) -> None:
    """Tells taps and (y, x) apart: tap (i, j) moves by (i - 1, 2 * (j - 1))."""
    arguments = make_arguments(device, modulated=False, **SAME, offset_groups=2)
    step = torch.arange(3, device=device) - 1
    taps = torch.stack([step[:, None].expand(3, 3), 2 * step[None, :].expand(3, 3)], dim=-1)
    arguments["offset"][:] = taps.reshape(1, 1, 18).repeat(1, 2, 1).reshape(1, 36, 1, 1)
    expected = F.conv2d(
        arguments["input"],
        arguments["weight"],
        arguments["bias"],
        padding=(2, 3),
        dilation=(2, 3),
        groups=2,
    )
    assert_near(operator(**arguments), expected, 1e-12)


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_each_offset_group_moves_its_own_channels(device: str, operator: Operator) -> None:
    input = torch.arange(4.0, device=device).reshape(1, 1, 1, 4) + torch.tensor(
        [0.0, 10.0, 20.0, 30.0], device=device
    ).reshape(1, 4, 1, 1)
    offset = torch.zeros(1, 4, 1, 4, device=device)
    offset[:, 3] = 1.0  # x of the second group
    mask = torch.tensor([1.0, 0.5], device=device).reshape(1, 2, 1, 1).repeat(1, 1, 1, 4)
    output = operator(input, offset, torch.eye(4, device=device)[:, :, None, None], mask=mask)
    expected = torch.tensor(
        [[0.0, 1, 2, 3], [10, 11, 12, 13], [10.5, 11, 11.5, 0], [15.5, 16, 16.5, 0]], device=device
    )
    assert torch.equal(output[0, :, 0], expected)


def test_int_and_pair_arguments_agree(device: str) -> None:
    arguments = make_arguments(device, stride=2, padding=1, dilation=2)
    pairs = {**arguments, "stride": (2, 2), "padding": (1, 1), "dilation": (2, 2)}
    assert_bit_equal(run(deform_conv2d, arguments), run(deform_conv2d, pairs))


def test_arguments_by_position(device: str) -> None:
    arguments = make_arguments(device)
    order = ("input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask")
    output = deform_conv2d(*(arguments[name] for name in order))
    assert torch.equal(output, deform_conv2d(**arguments))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("configuration", ["asymmetric", "64 to 48 channels", "depthwise"])
def test_memory_format_is_kept(device: str, configuration: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, **CONFIGURATIONS[configuration])
    last = {**arguments, "input": arguments["input"].to(memory_format=torch.channels_last)}
    output, gradients = run(deform_conv2d, arguments)
    last_output, last_gradients = run(deform_conv2d, last)
    assert output.is_contiguous()
    assert last_output.is_contiguous(memory_format=torch.channels_last)
    assert_near(last_output, output, TOLERANCE[dtype])
    for name, gradient in gradients.items():
        assert_near(last_gradients[name], gradient, TOLERANCE[dtype], f"gradient of {name}")


def test_strided_arguments(device: str) -> None:
    arguments = make_arguments(device)
    strided = {
        "input": arguments["input"].mT.contiguous().mT,
        "offset": arguments["offset"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "weight": arguments["weight"].to(memory_format=torch.channels_last),
        "bias": arguments["bias"].repeat_interleave(2)[::2],
        "mask": arguments["mask"].repeat(1, 1, 2, 1)[:, :, : arguments["mask"].size(2)],
    }
    for name, value in strided.items():
        assert torch.equal(value, arguments[name]) and not value.is_contiguous(), name
    assert_bit_equal(run(deform_conv2d, {**arguments, **strided}), run(deform_conv2d, arguments))


def test_expanded_arguments_and_gradient(device: str) -> None:
    arguments = make_arguments(device)
    arguments["input"] = arguments["input"][:1].expand(2, -1, -1, -1)
    arguments["offset"] = arguments["offset"][:, :, :1, :1].expand_as(arguments["offset"])
    outcomes = []
    for operator in (deform_conv2d, reference.deform_conv2d):
        leaves = {name: arguments[name].detach().requires_grad_() for name in TENSORS}
        operator(**{**arguments, **leaves}).sum().backward()
        outcomes.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in TENSORS:
        assert_near(outcomes[0][name], outcomes[1][name], 1e-12, f"gradient of {name}")


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("configuration", ["asymmetric", "1x1", "depthwise"])
def test_gradcheck(device: str, operator: Operator, configuration: str) -> None:
    arguments = make_arguments(
        device, **{**CONFIGURATIONS[configuration], "size": (4, 3), "batch": 1}
    )
    arguments = cloned_leaves(arguments, TENSORS)

    def function(*tensors: Tensor) -> Tensor:
        return operator(**{**arguments, **dict(zip(TENSORS, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(arguments[name] for name in TENSORS))


@pytest.mark.parametrize("only", TENSORS)
def test_gradient_of_one_argument_alone(device: str, only: str) -> None:
    arguments = make_arguments(device)
    _, all_gradients = run(deform_conv2d, arguments)
    _, gradient = run(deform_conv2d, arguments, wanted=[only])
    assert_near(gradient[only], all_gradients[only], 1e-12)


@pytest.mark.parametrize("frozen", TENSORS)
def test_gradients_with_one_argument_frozen(device: str, frozen: str) -> None:
    arguments = make_arguments(device)
    _, all_gradients = run(deform_conv2d, arguments)
    rest = [name for name in TENSORS if name != frozen]
    _, gradients = run(deform_conv2d, arguments, wanted=rest)
    assert list(gradients) == [name for name in all_gradients if name != frozen]
    for name, gradient in gradients.items():
        assert_near(gradient, all_gradients[name], 1e-12, f"gradient of {name}")


def test_no_graph_without_gradients(device: str) -> None:
    arguments = make_arguments(device)
    expected = deform_conv2d(**arguments)
    assert not expected.requires_grad
    trained = cloned_leaves(arguments, TENSORS)
    with torch.no_grad():
        assert not deform_conv2d(**trained).requires_grad
    with torch.inference_mode():
        assert torch.equal(deform_conv2d(**arguments), expected)


def test_double_backward_says_so(device: str) -> None:
    arguments = cloned_leaves(make_arguments(device), TENSORS)
    output = deform_conv2d(**arguments)
    with pytest.raises(RuntimeError, match=r"(?i)double.?backward|second.?order|twice"):
        (gradient,) = torch.autograd.grad(
            output.square().sum(), arguments["offset"], create_graph=True
        )
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wild", WILD_NUMBERS, ids=str)
def test_wild_offset_stays_local(device: str, wild: float, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype)
    clean_output, clean_gradients = run(deform_conv2d, arguments)
    # y of group 0, tap 2; x of group 1, tap 0; both of group 2, tap 5. Channels of 12 a group.
    places = [(0, 4, 1, 2), (1, 13, 2, 0), (1, 34, 0, 7), (1, 35, 0, 7)]
    poisoned = {**arguments, "offset": arguments["offset"].clone()}
    for place in places:
        poisoned["offset"][place] = wild
    assert_matches(deform_conv2d, reference.deform_conv2d, poisoned)

    output, gradients = run(deform_conv2d, poisoned)
    untouched = torch.ones_like(output, dtype=torch.bool)
    for image, channel, row, column in places:
        untouched[image, :, row, column] = False
        tap = channel // 2
        assert gradients["offset"][image, 2 * tap : 2 * tap + 2, row, column].eq(0).all()
        assert gradients["mask"][image, tap, row, column] == 0
    assert torch.equal(output[untouched], clean_output[untouched])
    elsewhere = torch.ones_like(gradients["offset"], dtype=torch.bool)
    for image, channel, row, column in places:
        elsewhere[image, channel // 2 * 2 : channel // 2 * 2 + 2, row, column] = False
    assert torch.equal(gradients["offset"][elsewhere], clean_gradients["offset"][elsewhere])


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("wild", WILD_NUMBERS, ids=str)
def test_nothing_but_wild_offsets_leaves_the_bias(
    device: str, operator: Operator, wild: float
) -> None:
    arguments = make_arguments(device, torch.float32)
    arguments["offset"].fill_(wild)
    output, gradients = run(operator, arguments)
    assert torch.equal(output, arguments["bias"][:, None, None].expand_as(output))
    for name in ("input", "offset", "weight", "mask"):
        assert gradients[name].eq(0).all(), name


@pytest.mark.parametrize("edge", [-1.0, 0.0, 1.0, 6.0, 7.0, 8.0, 9.0])
def test_exact_positions_match_reference(device: str, edge: float) -> None:
    """Every tap at integer positions, the last cells and the first ones beyond among them."""
    arguments = make_arguments(device, **POINT, spread=0.0)
    rows = torch.arange(7, device=device)[:, None]
    columns = torch.arange(9, device=device)[None, :]
    arguments["offset"][:, 0] = edge - rows
    arguments["offset"][:, 1] = edge - columns
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


# The arithmetic has other paths for wide channels and for half precision.
REPEATED = {
    "asymmetric": {"size": (23, 29)},
    "64 to 48 channels": {**CONFIGURATIONS["64 to 48 channels"], "size": (12, 17)},
    "depthwise": {**CONFIGURATIONS["depthwise"], "size": (23, 29)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", REPEATED.values(), ids=REPEATED.keys())
def test_runs_are_bit_equal(device: str, configuration: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, **configuration)
    first = run(deform_conv2d, arguments)
    assert_bit_equal(first, run(deform_conv2d, arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", REPEATED.values(), ids=REPEATED.keys())
def test_thread_counts_are_bit_equal(configuration: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = make_arguments("cpu", dtype, **configuration)
    one = run_with_threads(1, deform_conv2d, arguments)
    for threads in (2, 3):
        assert_bit_equal(one, run_with_threads(threads, deform_conv2d, arguments))


@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [
        ("asymmetric", torch.float32),
        ("without both", torch.float32),
        ("batch 0", torch.float32),
        ("depthwise", torch.float32),
        ("asymmetric", torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(device: str, configuration: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(
        device, dtype, coordinate_dtype=torch.float32, **CONFIGURATIONS[configuration]
    )
    for name, scalars in (("stride", "stride"), ("padding", "pad"), ("dilation", "dilation")):
        value = arguments[name]
        pair = (value, value) if isinstance(value, int) else value
        arguments[f"{scalars}_h"], arguments[f"{scalars}_w"] = pair
    arguments |= {n: arguments[n].requires_grad_() for n in TENSORS if arguments[n] is not None}
    torch.library.opcheck(
        torch.ops.d2_deform.deform_conv2d, registered_arguments("deform_conv2d", arguments)
    )


@pytest.mark.parametrize("configuration", ["asymmetric", "without both"])
def test_compiles_without_graph_break(device: str, configuration: str) -> None:
    torch._dynamo.reset()
    arguments = make_arguments(device, **CONFIGURATIONS[configuration])
    arguments = {name: value for name, value in arguments.items() if value is not None}
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    assert_bit_equal(run(compiled, arguments), run(deform_conv2d, arguments))


class _Convolution(torch.nn.Module):
    def forward(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, (2, 1), (1, 0), (2, 1), mask)


def test_exports_with_any_batch(device: str) -> None:
    names = ("input", "offset", "weight", "mask")
    example = make_arguments(device, torch.float32)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(
        _Convolution(),
        tuple(example[name] for name in names),
        dynamic_shapes=({0: batch}, {0: batch}, None, {0: batch}),
    )
    other = make_arguments(device, torch.float32, batch=5)
    tensors = tuple(other[name] for name in names)
    assert torch.equal(exported.module()(*tensors), _Convolution()(*tensors))


def test_autocast_keeps_offsets_in_float32(device: str) -> None:
    arguments = make_arguments(device, torch.float32)
    cast = {n: arguments[n].bfloat16() for n in ("input", "weight", "bias")}
    expected = deform_conv2d(**{**arguments, **cast})
    rounded = {n: arguments[n].bfloat16() for n in ("offset", "mask")}
    assert not torch.equal(deform_conv2d(**{**arguments, **cast, **rounded}), expected)

    leaves = cloned_leaves(arguments, TENSORS)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = deform_conv2d(**leaves)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().sum().backward()
    for name in TENSORS:
        assert leaves[name].grad.dtype == torch.float32, name
        assert leaves[name].grad.isfinite().all(), name


def test_autocast_takes_offsets_that_a_convolution_made(device: str) -> None:
    """Under autocast the offset branch is a convolution with bfloat16 output."""
    arguments = make_arguments(device, torch.float32)
    mixed = {n: arguments[n].bfloat16() for n in ("offset", "mask")}
    half = {n: arguments[n].bfloat16() for n in TENSORS}
    with torch.autocast(device, dtype=torch.bfloat16):
        output = deform_conv2d(**{**arguments, **mixed})
    assert torch.equal(output, deform_conv2d(**{**arguments, **half}))


# What is wrong, the change that makes it so, what the message must name.
WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "input without batch": (changed(input=lambda t: t[0]), "input"),
    "integer input": (changed(input=lambda t: t.long()), "input"),
    "weight of 3 dimensions": (changed(weight=lambda t: t[0]), "weight"),
    "weight of another dtype": (changed(weight=lambda t: t.double()), "weight"),
    "weight channels no divisor": (changed(weight=lambda t: t[:, [0, 1, 2, 0]]), "weight"),
    "outputs not divisible by groups": (changed(weight=lambda t: t[[0, 1, 0]]), "weight"),
    "offset of 3 dimensions": (changed(offset=lambda t: t[0]), "offset"),
    "odd offset channels": (changed(offset=lambda t: t[:, :-1]), "offset"),
    "offset groups no divisor": (changed(offset=lambda t: t.repeat(1, 2, 1, 1)[:, :48]), "offset"),
    "no offset channels": (changed(offset=lambda t: t[:, :0]), "offset"),
    "offset rows": (changed(offset=lambda t: t[:, :, :-1]), "offset"),
    "offset columns": (changed(offset=lambda t: t[..., :-1]), "offset"),
    "offset batch": (changed(offset=lambda t: t[:1]), "offset"),
    "integer offset": (changed(offset=lambda t: t.long()), "offset"),
    "offset finer than input": (changed(offset=lambda t: t.double()), "offset"),
    "mask channels": (changed(mask=lambda t: t[:, :-1]), "mask"),
    "mask of other groups": (changed(mask=lambda t: t[:, :6]), "mask"),
    "mask rows": (changed(mask=lambda t: t[:, :, :-1]), "mask"),
    "mask batch": (changed(mask=lambda t: t[:1]), "mask"),
    "mask of 3 dimensions": (changed(mask=lambda t: t[0]), "mask"),
    "integer mask": (changed(mask=lambda t: t.long()), "mask"),
    "mask finer than input": (changed(mask=lambda t: t.double()), "mask"),
    "bias length": (changed(bias=lambda t: t[:1]), "bias"),
    "bias of 2 dimensions": (changed(bias=lambda t: t[None]), "bias"),
    "bias dtype": (changed(bias=lambda t: t.double()), "bias"),
    "stride 0": (changed(stride=0), "stride"),
    "negative padding": (changed(padding=(-1, 0)), "padding"),
    "dilation 0": (changed(dilation=(1, 0)), "dilation"),
    "three strides": (changed(stride=(1, 1, 1)), "stride"),
    "input smaller than the kernel": (changed(input=lambda t: t[:, :, :2]), "input|kernel|weight"),
    "offset elsewhere": (changed(offset=lambda t: t.to("meta")), "offset"),
    "weight elsewhere": (changed(weight=lambda t: t.to("meta")), "weight"),
    "mask elsewhere": (changed(mask=lambda t: t.to("meta")), "mask"),
    "bias elsewhere": (changed(bias=lambda t: t.to("meta")), "bias"),
}


@pytest.mark.parametrize(("change", "named"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments_are_named(device: str, change: Any, named: str) -> None:
    arguments = make_arguments(device, torch.float32)
    deform_conv2d(**arguments)
    with pytest.raises((ValueError, RuntimeError), match=rf"(?i)\b({named})\b"):
        deform_conv2d(**{**arguments, **change(arguments)})


def test_wrong_shape_is_quoted(device: str) -> None:
    """The message tells what was given and what was expected."""
    arguments = make_arguments(device)
    arguments["offset"] = arguments["offset"][:, :-1]
    with pytest.raises((ValueError, RuntimeError), match=r"35"):
        deform_conv2d(**arguments)
    arguments = make_arguments(device)
    arguments["mask"] = arguments["mask"][:, :-1]
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)18.*17|17.*18"):
        deform_conv2d(**arguments)
