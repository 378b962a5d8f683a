"""Other libraries' operators; each is imported when it is asked for."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .problem import Absent, Call

__all__ = ["onnxruntime_deform_conv2d", "torchvision_ops"]


def torchvision_ops() -> Any:
    """The module torchvision.ops."""
    return _import("torchvision.ops")


def onnxruntime_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    padding: int,
    dilation: int,
) -> Call:
    """ONNX Runtime's DeformConv (opset 19) on CPU; inference only.

    It gets as many threads as torch has. They do not spin between runs: they would take the
    processor from whoever is timed next.

    Args:
        input, offset, weight, mask: as ``d2_deform.ops.deform_conv2d`` takes them, float32.
        padding, dilation: of both axes; the stride is 1.

    Returns:
        A call that returns the output, a tensor without gradient.

    Raises:
        Absent: onnx or onnxruntime is not there, or has no such operator.
    """
    onnx, runtime = _import("onnx"), _import("onnxruntime")
    tensors = {"X": input, "W": weight, "offset": offset}
    names = ["X", "W", "offset"]
    if mask is not None:
        tensors["mask"] = mask
        names += ["", "mask"]  # no bias
    kernel = list(weight.shape[2:])
    node = onnx.helper.make_node(
        "DeformConv",
        names,
        ["Y"],
        kernel_shape=kernel,
        pads=[padding] * 4,
        dilations=[dilation] * 2,
        group=input.shape[1] // weight.shape[1],
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
    )
    kind = onnx.TensorProto.FLOAT
    inputs = [
        onnx.helper.make_tensor_value_info(n, kind, list(t.shape)) for n, t in tensors.items()
    ]
    output = onnx.helper.make_tensor_value_info("Y", kind, None)
    graph = onnx.helper.make_graph([node], "deform_conv2d", inputs, [output])
    opset = onnx.helper.make_opsetid("", 19)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no public base class
        raise Absent(f"onnxruntime {runtime.__version__}: {error}") from error
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in tensors.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise Absent(f"{package} is not installed (pip install {package})") from error
