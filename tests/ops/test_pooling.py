"""What holds for both pooling operators; their own numbers are in their own files."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from .helpers import (
    ALL_DTYPES,
    TOLERANCE,
    WILD_NUMBERS,
    Operator,
    assert_bit_equal,
    assert_matches,
    assert_near,
    changed,
    cloned_leaves,
    registered_arguments,
    run,
    run_with_threads,
)
from .pooling import COMPILED, REFERENCE, make_arguments

TENSORS = ("input", "offset")

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "asymmetric": {},
    "release's coordinates": {"aligned": False},
    "rigid": {"class_groups": None},
    "rigid, release's coordinates": {"class_groups": None, "aligned": False},
    "one offset group": {"class_groups": 1},
    "an offset group a channel": {"class_groups": 4},
    "one sample": {"sampling_ratio": 1},
    "five samples": {"sampling_ratio": 5},
    "one bin": {"output_size": 1},
    "7x7 bins": {"output_size": 7, "rois": 2, "class_groups": 1},
    "no RoIs": {"rois": 0},
    "no images, no RoIs": {"batch": 0, "rois": 0},
    "no images": {"batch": 0, "rois": 2},
    "one image": {"batch": 1},
    "33 images": {"batch": 33, "rois": 35, "out_channels": 2, "size": (4, 3)},
    "67 RoIs": {"rois": 67, "sampling_ratio": 2},
    "17 channels": {"out_channels": 17, "class_groups": 17},
    "34 channels": {"out_channels": 34, "class_groups": 1, "sampling_ratio": 2},
    "one channel": {"out_channels": 1, "class_groups": 1},
    "one cell": {"size": (1, 1)},
    "one row": {"size": (1, 12)},
    "full resolution": {"spatial_scale": 1.0},
    "no reach": {"gamma": 0.0},
    "far reach": {"gamma": 2.0},
}


@pytest.fixture(params=list(COMPILED))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["compiled", "reference"])
def either(request: pytest.FixtureRequest, name: str) -> Operator:
    return (COMPILED if request.param == "compiled" else REFERENCE)[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_matches_reference(
    device: str, name: str, configuration: dict[str, Any], dtype: torch.dtype
) -> None:
    arguments = make_arguments(name, device, dtype, **configuration)
    assert_matches(COMPILED[name], REFERENCE[name], arguments)


@pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"]
)
def test_map_too_large_to_be_laid_out_at_once(
    device: str, name: str, format: torch.memory_format
) -> None:
    """About 12 MB: its channels are laid out and pooled some at a time."""
    channels = {"deform_roi_pool": 70, "deform_ps_roi_pool": 20}[name]
    arguments = make_arguments(
        name, device, torch.float32, batch=1, out_channels=channels, size=(180, 220)
    )
    arguments["input"] = arguments["input"].to(memory_format=format)
    assert_matches(COMPILED[name], REFERENCE[name], arguments)


@pytest.mark.parametrize("coordinates", ["features' dtype", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "configuration", ["asymmetric", "release's coordinates", "rigid", "34 channels"]
)
def test_half_precision_matches_double(
    device: str, name: str, configuration: str, dtype: torch.dtype, coordinates: str
) -> None:
    arguments = make_arguments(
        name,
        device,
        dtype,
        coordinate_dtype=torch.float32 if coordinates == "float32" else dtype,
        **CONFIGURATIONS[configuration],
    )
    assert_matches(COMPILED[name], REFERENCE[name], arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_coordinates_in_float32(
    device: str, name: str, dtype: torch.dtype
) -> None:
    """The one sample lies at cell 1024.75, between a 0 and a 1."""
    input = (torch.arange(1100, device=device) % 2).to(dtype).reshape(1, 1, 1, 1100)
    rois = torch.tensor([[0, 1024.0, 0, 1026.5, 1]], device=device)
    options = {"group_size": 1} if name == "deform_ps_roi_pool" else {}
    output = COMPILED[name](input, rois, output_size=1, sampling_ratio=1, **options)
    assert output.item() == 0.75


def test_signature_is_the_references(name: str) -> None:
    def names_and_defaults(function: Operator) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    expected = [
        ("input", inspect.Parameter.empty),
        ("rois", inspect.Parameter.empty),
        ("offset", None),
        ("output_size", 7),
        *([("group_size", 7)] if name == "deform_ps_roi_pool" else []),
        ("spatial_scale", 1.0),
        ("sampling_ratio", 4),
        ("gamma", 0.1),
        ("aligned", True),
    ]
    assert names_and_defaults(COMPILED[name]) == expected
    assert names_and_defaults(REFERENCE[name]) == expected


@pytest.mark.parametrize("aligned", [True, False])
def test_zero_offset_is_rigid(device: str, name: str, either: Operator, aligned: bool) -> None:
    arguments = make_arguments(name, device, aligned=aligned)
    arguments["offset"].zero_()
    deformable, _ = run(either, arguments)
    del arguments["offset"]
    rigid, _ = run(either, arguments)
    assert_near(deformable, rigid, 1e-14)


def test_int_and_pair_output_size_agree(device: str, name: str) -> None:
    arguments = make_arguments(name, device, output_size=3)
    pair = {**arguments, "output_size": (3, 3)}
    assert_bit_equal(run(COMPILED[name], arguments), run(COMPILED[name], pair))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("configuration", ["asymmetric", "rigid", "34 channels"])
def test_memory_format_is_kept(
    device: str, name: str, configuration: str, dtype: torch.dtype
) -> None:
    arguments = make_arguments(name, device, dtype, **CONFIGURATIONS[configuration])
    last = {**arguments, "input": arguments["input"].to(memory_format=torch.channels_last)}
    output, gradients = run(COMPILED[name], arguments)
    last_output, last_gradients = run(COMPILED[name], last)
    assert output.is_contiguous()
    assert last_output.is_contiguous(memory_format=torch.channels_last)
    assert_near(last_output, output, TOLERANCE[dtype])
    for tensor, gradient in gradients.items():
        assert_near(last_gradients[tensor], gradient, TOLERANCE[dtype], f"gradient of {tensor}")


def test_strided_arguments(device: str, name: str) -> None:
    arguments = make_arguments(name, device)
    strided = {
        "input": arguments["input"].mT.contiguous().mT,
        "rois": arguments["rois"].t().contiguous().t(),
        "offset": arguments["offset"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    }
    for tensor, value in strided.items():
        assert torch.equal(value, arguments[tensor]) and not value.is_contiguous(), tensor
    assert_bit_equal(run(COMPILED[name], {**arguments, **strided}), run(COMPILED[name], arguments))


def test_expanded_arguments_and_gradient(device: str, name: str) -> None:
    arguments = make_arguments(name, device)
    arguments["input"] = arguments["input"][:1].expand(2, -1, -1, -1)
    arguments["offset"] = arguments["offset"][:, :, :1, :1].expand_as(arguments["offset"])
    outcomes = []
    for operator in (COMPILED[name], REFERENCE[name]):
        leaves = {tensor: arguments[tensor].detach().requires_grad_() for tensor in TENSORS}
        operator(**{**arguments, **leaves}).sum().backward()
        outcomes.append({tensor: leaf.grad for tensor, leaf in leaves.items()})
    for tensor in TENSORS:
        assert_near(outcomes[0][tensor], outcomes[1][tensor], 1e-12, f"gradient of {tensor}")


@pytest.mark.parametrize("aligned", [True, False])
def test_gradcheck(device: str, name: str, either: Operator, aligned: bool) -> None:
    arguments = make_arguments(
        name, device, size=(5, 4), rois=3, sampling_ratio=2, out_channels=2, aligned=aligned
    )

    def function(input: Tensor, offset: Tensor) -> Tensor:
        return either(**{**arguments, "input": input, "offset": offset})

    leaves = cloned_leaves(arguments, TENSORS)
    assert torch.autograd.gradcheck(function, (leaves["input"], leaves["offset"]))


def test_rois_receive_no_gradient(device: str, name: str, either: Operator) -> None:
    leaves = cloned_leaves(make_arguments(name, device), ("input", "offset", "rois"))
    either(**leaves).sum().backward()
    assert leaves["input"].grad is not None
    assert leaves["offset"].grad is not None
    assert leaves["rois"].grad is None


@pytest.mark.parametrize("only", TENSORS)
def test_gradient_of_one_argument_alone(device: str, name: str, only: str) -> None:
    arguments = make_arguments(name, device)
    _, both = run(COMPILED[name], arguments)
    _, alone = run(COMPILED[name], arguments, wanted=[only])
    assert list(alone) == [only]
    assert_near(alone[only], both[only], 1e-13)


@pytest.mark.parametrize("configuration", ["asymmetric", "rigid", "34 channels"])
def test_no_gradient_asked_for(device: str, name: str, configuration: str) -> None:
    """The registered operator, as autograd never calls it."""
    arguments = make_arguments(name, device, **CONFIGURATIONS[configuration])
    arguments["grad_output"] = torch.ones_like(COMPILED[name](**arguments))
    arguments |= dict.fromkeys(["need_input", "need_offset", "deterministic"], False)
    arguments.setdefault("offset", None)
    operator = getattr(torch.ops.d2_deform, f"{name}_backward")
    gradients = operator(*registered_arguments(f"{name}_backward", arguments))
    assert [gradient.numel() for gradient in gradients] == [0, 0]


def test_no_graph_without_gradients(device: str, name: str) -> None:
    arguments = make_arguments(name, device)
    expected = COMPILED[name](**arguments)
    assert not expected.requires_grad
    with torch.no_grad():
        assert not COMPILED[name](**cloned_leaves(arguments, TENSORS)).requires_grad
    with torch.inference_mode():
        assert torch.equal(COMPILED[name](**arguments), expected)


def test_double_backward_says_so(device: str, name: str) -> None:
    leaves = cloned_leaves(make_arguments(name, device), TENSORS)
    output = COMPILED[name](**leaves)
    with pytest.raises(RuntimeError, match=r"(?i)double.?backward|second.?order|twice"):
        (gradient,) = torch.autograd.grad(
            output.square().sum(), leaves["offset"], create_graph=True
        )
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("wild", WILD_NUMBERS, ids=str)
def test_wild_offset_stays_local(
    device: str, name: str, wild: float, aligned: bool, dtype: torch.dtype
) -> None:
    arguments = make_arguments(name, device, dtype, aligned=aligned)
    clean_output, clean_gradients = run(COMPILED[name], arguments)
    poisoned = {**arguments, "offset": arguments["offset"].clone()}
    # x of the first two output channels in one bin, y of the last two in another.
    places = [(1, 0, 2, 0), (3, 3, 0, 1)]
    for place in places:
        poisoned["offset"][place] = wild
    assert_matches(COMPILED[name], REFERENCE[name], poisoned)

    output, gradients = run(COMPILED[name], poisoned)
    fed = torch.zeros_like(output, dtype=torch.bool)
    steering = torch.zeros_like(gradients["offset"], dtype=torch.bool)
    for roi, channel, row, column in places:
        group = channel // 2
        fed[roi, 2 * group : 2 * group + 2, row, column] = True
        steering[roi, 2 * group : 2 * group + 2, row, column] = True
    assert output[fed].eq(0).all()
    assert torch.equal(output[~fed], clean_output[~fed])
    assert gradients["offset"][steering].eq(0).all()
    assert torch.equal(gradients["offset"][~steering], clean_gradients["offset"][~steering])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("wild", WILD_NUMBERS, ids=str)
def test_wild_box_stays_local(
    device: str, name: str, wild: float, column: int, aligned: bool
) -> None:
    arguments = make_arguments(name, device, torch.float32, aligned=aligned)
    clean_output, clean_gradients = run(COMPILED[name], arguments)
    poisoned = {**arguments, "rois": arguments["rois"].clone()}
    poisoned["rois"][1, column] = wild
    output, gradients = run(COMPILED[name], poisoned)
    # The reference in float32 too: whether a box overflows depends on it.
    expected_output, expected_gradients = run(REFERENCE[name], poisoned)
    assert_near(output, expected_output, TOLERANCE[torch.float32])
    for tensor, gradient in gradients.items():
        assert_near(gradient, expected_gradients[tensor], TOLERANCE[torch.float32], tensor)
    others = [0, 2, 3, 4]
    assert torch.equal(output[others], clean_output[others])
    assert torch.equal(gradients["offset"][others], clean_gradients["offset"][others])


@pytest.mark.parametrize("wild", WILD_NUMBERS, ids=str)
def test_nothing_but_wild_boxes(device: str, name: str, either: Operator, wild: float) -> None:
    arguments = make_arguments(name, device, torch.float32)
    arguments["rois"][:, 1:] = wild
    output, gradients = run(either, arguments)
    assert output.eq(0).all()
    assert gradients["input"].eq(0).all()
    assert gradients["offset"].eq(0).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_box_over_all_numbers(device: str, name: str, either: Operator, aligned: bool) -> None:
    """Its width overflows float32 to infinity."""
    arguments = make_arguments(name, device, torch.float32, spatial_scale=1.0, aligned=aligned)
    arguments["rois"][:, 1:] = torch.tensor([-3e38, -3e38, 3e38, 3e38], device=device)
    output, gradients = run(either, arguments)
    assert output.eq(0).all()
    assert gradients["input"].eq(0).all()
    assert gradients["offset"].eq(0).all()


@pytest.mark.parametrize("index", [-1.0, 2.0, 1e9, -1e38, 1e38, float("nan"), float("inf")])
def test_batch_index_out_of_range(device: str, name: str, either: Operator, index: float) -> None:
    arguments = make_arguments(name, device, torch.float32)
    arguments["rois"][[1, 3], 0] = index
    output, gradients = run(either, arguments)
    assert output[[1, 3]].eq(0).all()
    assert gradients["offset"][[1, 3]].eq(0).all()
    kept = [0, 2, 4]
    rest = {**arguments, "rois": arguments["rois"][kept], "offset": arguments["offset"][kept]}
    assert torch.equal(output[kept], either(**rest))
    assert gradients["offset"][kept].ne(0).any()


@pytest.mark.parametrize(
    "box",
    [(100, 100, 120, 130), (-50, -40, -20, -10), (3, 100, 9, 120), (-90, 2, -60, 9)],
    ids=["right below", "left above", "below", "left"],
)
@pytest.mark.parametrize("aligned", [True, False])
def test_box_outside_the_map(
    device: str, name: str, either: Operator, aligned: bool, box: tuple[int, ...]
) -> None:
    arguments = make_arguments(name, device, aligned=aligned, gamma=0.01)
    arguments["rois"][:, 1:] = torch.tensor(box, device=device)
    output, gradients = run(either, arguments)
    assert output.eq(0).all()
    assert gradients["input"].eq(0).all()
    assert gradients["offset"].eq(0).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_inverted_box_is_as_small_as_a_box_can_be(
    device: str, name: str, either: Operator, aligned: bool
) -> None:
    arguments = make_arguments(name, device, aligned=aligned)
    boxes = arguments["rois"]
    boxes[:, 1:] = torch.tensor([6.0, 4.0, 1.0, 2.0], device=device)
    inverted = run(either, arguments)
    boxes[:, 3:] = torch.tensor([6.0, 4.0] if aligned else [5.0, 3.0], device=device)
    assert_bit_equal(inverted, run(either, arguments))
    boxes[:, 3:] = float("nan")
    assert_bit_equal(inverted, run(either, arguments))
    assert inverted[0].ne(0).any()


REPEATED: dict[str, dict[str, Any]] = {
    "class-aware": {"rois": 40, "size": (17, 19)},
    "release's coordinates": {"rois": 40, "size": (17, 19), "aligned": False},
    "rigid": {"rois": 40, "size": (17, 19), "class_groups": None},
    "34 channels": {**CONFIGURATIONS["34 channels"], "rois": 40},
    "one image": {"rois": 40, "batch": 1, "size": (5, 4)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", REPEATED.values(), ids=REPEATED.keys())
def test_runs_are_bit_equal(
    device: str, name: str, configuration: dict[str, Any], dtype: torch.dtype
) -> None:
    arguments = make_arguments(name, device, dtype, **configuration)
    assert_bit_equal(run(COMPILED[name], arguments), run(COMPILED[name], arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", REPEATED.values(), ids=REPEATED.keys())
def test_thread_counts_are_bit_equal(
    name: str, configuration: dict[str, Any], dtype: torch.dtype
) -> None:
    arguments = make_arguments(name, "cpu", dtype, **configuration)
    one = run_with_threads(1, COMPILED[name], arguments)
    for threads in (2, 3):
        assert_bit_equal(one, run_with_threads(threads, COMPILED[name], arguments))


@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [
        ("asymmetric", torch.float32),
        ("rigid", torch.float32),
        ("no RoIs", torch.float32),
        ("asymmetric", torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(device: str, name: str, configuration: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(
        name, device, dtype, coordinate_dtype=torch.float32, **CONFIGURATIONS[configuration]
    )
    arguments["pooled_h"], arguments["pooled_w"] = arguments["output_size"]
    arguments.setdefault("offset", None)
    for tensor in TENSORS:
        if arguments[tensor] is not None:
            arguments[tensor].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.d2_deform, name), registered_arguments(name, arguments))


@pytest.mark.parametrize("configuration", ["asymmetric", "rigid"])
def test_compiles_without_graph_break(device: str, name: str, configuration: str) -> None:
    torch._dynamo.reset()
    arguments = make_arguments(name, device, **CONFIGURATIONS[configuration])
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    assert_bit_equal(run(compiled, arguments), run(COMPILED[name], arguments))


class _Pooling(torch.nn.Module):
    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.operator = COMPILED[name]
        self.options = options

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
        return self.operator(input, rois, offset, **self.options)


def test_exports_with_any_batch_and_number_of_rois(device: str, name: str) -> None:
    tensors = ("input", "rois", "offset")
    example = make_arguments(name, device, torch.float32)
    module = _Pooling(name, {n: v for n, v in example.items() if n not in tensors})
    batch, count = torch.export.Dim("batch", min=1), torch.export.Dim("count", min=0)
    exported = torch.export.export(
        module,
        tuple(example[tensor] for tensor in tensors),
        dynamic_shapes=({0: batch}, {0: count}, {0: count}),
    )
    for images, rois in ((5, 11), (1, 2), (3, 0)):
        other = make_arguments(name, device, torch.float32, batch=images, rois=rois)
        given = tuple(other[tensor] for tensor in tensors)
        assert torch.equal(exported.module()(*given), module(*given))


def test_autocast_keeps_coordinates_in_float32(device: str, name: str) -> None:
    arguments = make_arguments(name, device, torch.float32)
    half = {**arguments, "input": arguments["input"].bfloat16()}
    expected = COMPILED[name](**half)
    for tensor in ("rois", "offset"):
        rounded = {**half, tensor: arguments[tensor].bfloat16()}
        assert not torch.equal(COMPILED[name](**rounded), expected)

    leaves = cloned_leaves(arguments, TENSORS)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = COMPILED[name](**leaves)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().sum().backward()
    for tensor in TENSORS:
        assert leaves[tensor].grad.dtype == torch.float32, tensor
        assert leaves[tensor].grad.isfinite().all(), tensor


# What is wrong, the change that makes it so, what the message must name.
WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "input without batch": (changed(input=lambda t: t[0]), "input"),
    "integer input": (changed(input=lambda t: t.long()), "input"),
    "rois of 4 columns": (changed(rois=lambda t: t[:, :4]), "rois"),
    "rois of 1 dimension": (changed(rois=lambda t: t[0]), "rois"),
    "integer rois": (changed(rois=lambda t: t.long()), "rois"),
    "rois finer than input": (changed(rois=lambda t: t.double()), "rois"),
    "rois elsewhere": (changed(rois=lambda t: t.to("meta")), "rois"),
    "offset of 3 dimensions": (changed(offset=lambda t: t[0]), "offset"),
    "offset of fewer RoIs": (changed(offset=lambda t: t[:-1]), "offset"),
    "odd offset channels": (changed(offset=lambda t: t[:, :3]), "offset"),
    "no offset channels": (changed(offset=lambda t: t[:, :0]), "offset"),
    "offset groups no divisor": (changed(offset=lambda t: t.repeat(1, 2, 1, 1)[:, :6]), "offset"),
    "offset rows": (changed(offset=lambda t: t[:, :, :-1]), "offset"),
    "offset columns": (changed(offset=lambda t: t[..., :-1]), "offset"),
    "integer offset": (changed(offset=lambda t: t.long()), "offset"),
    "offset finer than input": (changed(offset=lambda t: t.double()), "offset"),
    "offset elsewhere": (changed(offset=lambda t: t.to("meta")), "offset"),
    "no bins": (changed(output_size=0), "output_size"),
    "three bin numbers": (changed(output_size=(3, 2, 1)), "output_size"),
    "no samples": (changed(sampling_ratio=0), "sampling_ratio"),
    "no scale": (changed(spatial_scale=0.0), "spatial_scale"),
    "negative scale": (changed(spatial_scale=-0.5), "spatial_scale"),
    "scale that is no number": (changed(spatial_scale=float("nan")), "spatial_scale"),
    "infinite scale": (changed(spatial_scale=float("inf")), "spatial_scale"),
}


@pytest.mark.parametrize(("change", "named"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments_are_named(device: str, name: str, change: Any, named: str) -> None:
    arguments = make_arguments(name, device, torch.float32)
    COMPILED[name](**arguments)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{named}\b"):
        COMPILED[name](**{**arguments, **change(arguments)})


def test_wrong_shape_is_quoted(device: str, name: str) -> None:
    """The message tells what was given and what was expected: 5 RoIs."""
    arguments = make_arguments(name, device)
    arguments["offset"] = arguments["offset"][:4]
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)4.*5|5.*4"):
        COMPILED[name](**arguments)
