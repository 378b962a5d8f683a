"""What only the CUDA operators have: two ways to sum gradients, chunks, packs, streams, devices.

All other tests run on them as well, through the fixture `device`.
"""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_deform.ops import deform_conv2d, reference

from . import pooling
from .conftest import EMULATED, GPUS, require_cuda
from .emulation import ROOT, compiler, emulated
from .helpers import (
    ALL_DTYPES,
    TOLERANCE,
    Arguments,
    assert_bit_equal,
    assert_matches,
    assert_near,
    in_double,
    random,
    run,
)
from .test_deform_conv2d import CONFIGURATIONS, SAME
from .test_deform_conv2d import make_arguments as make_convolution
from .test_pooling import CONFIGURATIONS as POOLINGS

# A product's factors are rounded to ten bits, as in float16.
TF32_TOLERANCE = TOLERANCE[torch.float16]

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    **CONFIGURATIONS,
    "depthwise, 16 channels": {
        **SAME,
        "channels": 16,
        "out_channels": 16,
        "groups": 16,
        "offset_groups": 2,
    },
    "groups of 16, deformable groups of 24": {
        **SAME,
        "channels": 48,
        "out_channels": 6,
        "groups": 3,
        "offset_groups": 2,
    },
    "33 lanes": {**SAME, "channels": 264, "out_channels": 8, "groups": 1, "offset_groups": 1},
}


@pytest.fixture
def cuda() -> str:
    require_cuda()
    return "cuda"


@pytest.fixture(params=[EMULATED, *GPUS])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `device`, but in the mode that the test chooses."""
    if request.param == "cuda":
        require_cuda()
        yield "cuda"
    else:
        with emulated():
            yield "cpu"


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def convolution(device: str, dtype: torch.dtype, **configuration: Any) -> Arguments:
    arguments = make_convolution(device, dtype, **configuration)
    return {name: value for name, value in arguments.items() if value is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution_with_atomics(
    gpu: str, configuration: dict[str, Any], dtype: torch.dtype
) -> None:
    arguments = convolution(gpu, dtype, **configuration)
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("configuration", POOLINGS.values(), ids=POOLINGS.keys())
@pytest.mark.parametrize("name", pooling.COMPILED)
def test_pooling_with_atomics(
    gpu: str, name: str, configuration: dict[str, Any], aligned: bool, dtype: torch.dtype
) -> None:
    arguments = pooling.make_arguments(name, gpu, dtype, **{**configuration, "aligned": aligned})
    assert_matches(pooling.COMPILED[name], pooling.REFERENCE[name], arguments)


@pytest.mark.parametrize("workspace", [1, 1000, 20000])
@pytest.mark.parametrize(
    "configuration",
    ["asymmetric", "without mask", "batch 33", "depthwise", "64 to 48 channels", "many pixels"],
)
def test_any_workspace(
    gpu: str,
    deterministic: bool,
    configuration: str,
    workspace: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks end within pictures and within rows."""
    monkeypatch.setenv("D2_DEFORM_CUDA_WORKSPACE", str(workspace))
    arguments = convolution(gpu, torch.float64, **CONVOLUTIONS[configuration])
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("configuration", ["64 to 48 channels", "depthwise, 16 channels"])
def test_input_that_is_not_aligned_to_packs(
    gpu: str, deterministic: bool, configuration: str, dtype: torch.dtype
) -> None:
    arguments = convolution(gpu, dtype, **CONVOLUTIONS[configuration])
    input = arguments["input"].to(memory_format=torch.channels_last)
    memory = input.new_empty(input.numel() + 1)[1:]
    arguments["input"] = memory.as_strided(input.size(), input.stride()).copy_(input)
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)


@pytest.mark.xdist_group("cuda_emulation")
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler for the emulation")
def test_sanitizers_small_case_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """What tools/check_cuda.py gives to compute-sanitizer, here on the emulation."""
    code = runpy.run_path(str(ROOT / "tools" / "check_cuda.py"))["SMALL_CASE"]
    with emulated():
        exec(code.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", ""), {})
    assert capsys.readouterr().out == "small case done\n"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_divider(tmp_path: Path) -> None:
    source = Path(__file__).with_name("divider.cpp")
    program = str(tmp_path / "divider")
    subprocess.run([str(compiler()), "-std=c++17", "-O1", str(source), "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:]


@pytest.mark.parametrize("name", ["deform_conv2d", *pooling.COMPILED])
def test_repeated_runs_are_bit_equal_in_deterministic_mode(cuda: str, name: str) -> None:
    """Many samples to a cell, so that atomic sums would differ."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if name == "deform_conv2d":
            operator: Any = deform_conv2d
            arguments = convolution(
                cuda,
                torch.float32,
                **{**SAME, "size": (64, 64), "channels": 16, "groups": 1},
                offset_groups=1,
                batch=4,
                spread=8.0,
            )
        else:
            operator = pooling.COMPILED[name]
            arguments = pooling.make_arguments(name, cuda, torch.float32, rois=500, size=(30, 30))
        first = run(operator, arguments)
        for _ in range(5):
            assert_bit_equal(first, run(operator, arguments))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_tf32_where_torch_is_told_so(cuda: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        arguments = convolution(cuda, torch.float32, **CONVOLUTIONS["64 to 48 channels"])
        tolerance = TOLERANCE[torch.float32] if precision == "highest" else TF32_TOLERANCE
        output, gradients = run(deform_conv2d, arguments)
        expected, expected_gradients = run(reference.deform_conv2d, in_double(arguments))
        assert_near(output, expected, tolerance)
        for name, gradient in gradients.items():
            assert_near(gradient, expected_gradients[name], tolerance, f"gradient of {name}")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["deform_conv2d", *pooling.COMPILED])
def test_other_streams(cuda: str, name: str) -> None:
    """The tensors are ready on a side stream long after the call was made there, and only there."""
    if name == "deform_conv2d":
        operator: Any = deform_conv2d
        arguments = convolution(cuda, torch.float32, **CONVOLUTIONS["64 to 48 channels"])
    else:
        operator = pooling.COMPILED[name]
        arguments = pooling.make_arguments(name, cuda, torch.float32)
    expected, expected_gradients = run(operator, arguments)
    late = {**arguments, "input": torch.zeros_like(arguments["input"])}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late["input"].copy_(arguments["input"])
        output, gradients = run(operator, late)
    stream.synchronize()
    assert_near(output, expected, 1e-6)
    for tensor, gradient in gradients.items():
        assert_near(gradient, expected_gradients[tensor], 1e-5, f"gradient of {tensor}")


def test_second_device(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert torch.cuda.current_device() == 0
    arguments = convolution("cuda:1", torch.float32)
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)
    for name, operator in pooling.COMPILED.items():
        arguments = pooling.make_arguments(name, "cuda:1", torch.float32)
        assert_matches(operator, pooling.REFERENCE[name], arguments)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("left", ["input", "offset", "weight", "bias", "mask"])
def test_convolution_of_tensors_on_two_devices(cuda: str, left: str) -> None:
    arguments = make_convolution(cuda, torch.float32)
    arguments[left] = arguments[left].cpu()
    named = "offset" if left == "input" else left
    with pytest.raises(ValueError, match=rf"{named}: is on c\w+.* but input is on c\w+.*together"):
        deform_conv2d(**arguments)
    tensors = [arguments[name] for name in ("input", "offset", "weight", "bias", "mask")]
    with pytest.raises(RuntimeError, match=f"{named}: lies on another device than input"):
        torch.ops.d2_deform.deform_conv2d(*tensors, 2, 1, 1, 0, 2, 1)


@pytest.mark.parametrize("name", pooling.COMPILED)
@pytest.mark.parametrize("left", ["rois", "offset"])
def test_pooling_of_tensors_on_two_devices(cuda: str, name: str, left: str) -> None:
    arguments = pooling.make_arguments(name, cuda, torch.float32)
    arguments[left] = arguments[left].cpu()
    with pytest.raises(ValueError, match=f"{left}: is on cpu but input is on cuda.*together"):
        pooling.COMPILED[name](**arguments)


def test_workspace_is_all_that_a_large_batch_needs(cuda: str) -> None:
    """The columns of this call would take 2.4 GB."""
    with torch.no_grad():
        x = torch.randn(64, 64, 128, 128, device=cuda).to(memory_format=torch.channels_last)
        offset = torch.zeros(64, 18, 128, 128, device=cuda)
        weight = torch.randn(64, 64, 3, 3, device=cuda)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = deform_conv2d(x, offset, weight, padding=1)
        extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert extra < 160 << 20  # 32 MiB of columns, the weight, cuBLAS's own workspaces


def require_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free memory on the GPU")


def test_map_of_more_than_two_to_the_31_elements(cuda: str) -> None:
    require_memory(16)
    x = torch.zeros(1, 1, 46400, 46400, device=cuda, dtype=torch.bfloat16)
    x[:, :, ::100, ::100] = torch.rand(464, 464, device=cuda)
    offset = torch.zeros(1, 2, 464, 464, device=cuda)
    weight = torch.ones(1, 1, 1, 1, device=cuda, dtype=torch.bfloat16)
    output = deform_conv2d(x, offset, weight, stride=100)
    assert torch.equal(output, x[:, :, ::100, ::100])
    rois = torch.tensor([[0.0, 46398.5, 46398.5, 46399.5, 46399.5]], device=cuda)
    x[..., -1, -1] = 1.0
    for pool in pooling.COMPILED.values():
        more = {"group_size": 1} if pool is pooling.COMPILED["deform_ps_roi_pool"] else {}
        assert pool(x, rois, output_size=1, sampling_ratio=2, **more).item() > 0.0


def test_output_of_more_than_two_to_the_31_elements(cuda: str) -> None:
    require_memory(40)
    x = torch.rand(1, 8, 2048, 2048, device=cuda, dtype=torch.bfloat16)
    offset = torch.zeros(1, 2, 2048, 2048, device=cuda)
    weight = torch.rand(520, 8, 1, 1, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    output = deform_conv2d(x, offset, weight)
    assert output.numel() > 2**31
    tail = F.conv2d(x[:, :, -8:], weight[-4:])
    assert_near(output[:, -4:, -8:].detach(), tail.detach(), TOLERANCE[torch.bfloat16])
    gradient: Tensor = torch.zeros_like(output)
    gradient[:, -1, -1] = 1.0
    (got,) = torch.autograd.grad(output, weight, gradient)
    expected = x[0, :, -1].double().sum(dim=1)
    assert got[:-1].eq(0).all()
    assert_near(got[-1, :, 0, 0], expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_of_its_usual_size(cuda: str, dtype: torch.dtype) -> None:
    """The res5 layer of the paper at batch 2: several chunks, products of full size."""
    generator = torch.Generator(cuda).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=cuda, generator=generator)

    arguments = {
        "input": normal(2, 512, 38, 63).to(dtype),
        "offset": 2 * normal(2, 72, 38, 63),
        "weight": normal(512, 512, 3, 3).to(dtype),
        "padding": 2,
        "dilation": 2,
    }
    assert_matches(deform_conv2d, reference.deform_conv2d, arguments)
    assert_matches(
        deform_conv2d,
        reference.deform_conv2d,
        {**arguments, "offset": random(2, 18, 38, 63, dtype=torch.float32, device=cuda)},
    )
