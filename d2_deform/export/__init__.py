"""Networks as files that run without Detectron2: torch.export, TorchScript, ONNX."""

from d2_deform.export.exported_file import Difference, compare_detections, load_exported
from d2_deform.export.formats import FORMATS, ONNX_OPSET, export_network
from d2_deform.export.networks import ExportedNetwork, build_exported
from d2_deform.export.standard_operators import StandardOperators

__all__ = [
    "FORMATS",
    "ONNX_OPSET",
    "Difference",
    "ExportedNetwork",
    "StandardOperators",
    "build_exported",
    "compare_detections",
    "export_network",
    "load_exported",
]
