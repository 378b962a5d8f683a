"""Running exported files, and comparing what they say with the network they were made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torchvision
from torch import Tensor

import d2_deform.ops  # noqa: F401  (its operators are in the files, as torchvision's are)

__all__ = ["Difference", "compare_detections", "load_exported"]

Outputs = tuple[Tensor, ...]


def load_exported(path: str, format: str, num_threads: int = 0) -> Callable[[Tensor], Outputs]:
    """
    Args:
        path: a file written by :func:`~d2_deform.export.formats.export_network`.
        format: the one it was written in.
        num_threads: of ONNX Runtime, 0 as it likes; the others use torch's.

    Returns:
        A function from ``image`` (Tensor[3, H, W] of float32) to the file's outputs, in order.

    Raises:
        ImportError: ONNX Runtime is missing.
    """
    if format == "torch-export":
        with open(path, "rb") as file:  # by name it would have to end in .pt2
            # torch 2.10 would refuse sizes whose maps are odd where the example's were even.
            return torch.export.load(file).module(check_guards=False)
    if format == "torchscript":
        traced = torch.jit.load(path)

        def run_traced(image: Tensor) -> Outputs:
            with torch.no_grad():
                outputs = traced(image)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return run_traced
    if find_spec("onnxruntime") is None:
        raise ImportError("running an ONNX file needs onnxruntime: pip install onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run_session(image: Tensor) -> Outputs:
        return tuple(torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()}))

    return run_session


@dataclass
class Difference:
    """Between two lists of detections of one picture.

    Attributes:
        unmatched: detections of either that have no partner of their class, at an overlap above
            0.9, in the other.
        box: greatest difference of two partners' coordinates, in pixels.
        score: greatest difference of their scores.
    """

    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        """Of both pictures."""
        return Difference(
            self.unmatched + other.unmatched,
            max(self.box, other.box),
            max(self.score, other.score),
        )


def compare_detections(first: Sequence[Tensor], second: Sequence[Tensor]) -> Difference:
    """Whatever their order, as equal scores have none.

    Args:
        first, second: boxes (Tensor[D, 4]), scores (Tensor[D]) and classes (Tensor[D]).
    """
    boxes, scores, classes = first
    other_boxes, other_scores, other_classes = second
    overlap = torchvision.ops.box_iou(boxes, other_boxes)
    overlap = torch.where(classes[:, None] == other_classes[None, :], overlap, 0.0)
    left, right = [], []
    while overlap.numel() and overlap.max() > 0.9:  # at most D pairs, the closest first
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        left.append(row)
        right.append(column)
        overlap[row], overlap[:, column] = 0.0, 0.0
    difference = Difference(len(boxes) + len(other_boxes) - 2 * len(left))
    if left:
        difference.box = float((boxes[left] - other_boxes[right]).abs().max())
        difference.score = float((scores[left] - other_scores[right]).abs().max())
    return difference
