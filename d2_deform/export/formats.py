"""The three formats that networks are exported to."""

import io
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from d2_deform.export.networks import ExportedNetwork
from d2_deform.export.standard_operators import StandardOperators

__all__ = ["FORMATS", "ONNX_OPSET", "export_network"]

ONNX_OPSET = 20  # DeformConv is there from 19 on
EXAMPLE_SIZE = (160, 224)  # of the picture that a network is exported with; any other will do


def export_network(
    network: ExportedNetwork, format: str, settings: Mapping[str, str] | None = None
) -> bytes:
    """A network as a file's contents; height and width of the picture stay free.

    Args:
        network: of :func:`~d2_deform.export.networks.build_exported`, on CPU; its parameters
            require no gradient afterwards.
        format: a key of ``FORMATS``.
        settings: told with the file: metadata of an ONNX file, for the others extra files of these
            names.

    Raises:
        ValueError: the format is unknown.
        ImportError: a package that the format needs is missing; the message names it.
    """
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} given, accepted are {', '.join(FORMATS)}")
    network.requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace may fix; tests try other sizes
        return FORMATS[format](network, dict(settings or {}))


def _example() -> Tensor:
    return torch.linspace(0, 255, 3 * EXAMPLE_SIZE[0] * EXAMPLE_SIZE[1]).reshape(3, *EXAMPLE_SIZE)


def _capture(network: ExportedNetwork) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(
        network, (_example(),), dynamic_shapes={"image": {1: free, 2: free}}, strict=False
    )


def _to_torch_export(network: ExportedNetwork, settings: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_capture(network), file, extra_files=settings)
    return file.getvalue()


def _to_torchscript(network: ExportedNetwork, settings: dict[str, str]) -> bytes:
    # The tracer's own check runs the network again and compares, which takes as long once more.
    traced = torch.jit.trace(network, (_example(),), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files=settings)
    return file.getvalue()


def _to_onnx(network: ExportedNetwork, settings: dict[str, str]) -> bytes:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export to ONNX needs {' and '.join(missing)}: pip install "
            "--no-build-isolation 'd2_deform[onnx]', or pip install onnx onnxscript"
        )
    with StandardOperators():
        captured = _capture(network)
    program = torch.onnx.export(
        captured,
        (),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=["image"],
        output_names=list(network.output_names),
        verbose=False,
    )
    assert program is not None
    foreign = {node.op_type for node in program.model.graph if node.domain}
    if foreign:
        raise RuntimeError(f"ONNX has no operators {', '.join(sorted(foreign))}")
    program.model.metadata_props.update(settings)
    return program.model_proto.SerializeToString()


FORMATS: dict[str, Callable[[ExportedNetwork, dict[str, str]], bytes]] = {
    "torch-export": _to_torch_export,
    "torchscript": _to_torchscript,
    "onnx": _to_onnx,
}
