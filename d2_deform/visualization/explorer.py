"""The explorer: one HTML page on which a person asks any place of a picture where a network looks.

The page holds the pictures, the offset fields, quantised, and explorer.js, which traces sampling
points as :meth:`SamplingRecord.trace` does. It loads nothing and needs neither server nor network.
"""

import base64
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import cv2
import numpy as np

from d2_deform.visualization.prediction import SampledPrediction
from d2_deform.visualization.sampling import OffsetField, stride_between

__all__ = ["build_explorer_page"]

MAX_DETECTIONS = 50  # of a picture
MAX_PICTURE_SIDE = 1600  # pixels; larger ones are stored smaller
MAX_OFFSET_BYTES = 2 * 1024**2  # of a picture's fields in int16; beyond, they are stored in int8
PICTURE_QUALITY = 90  # JPEG


def build_explorer_page(
    predictions: Mapping[str, SampledPrediction],
    layers: int = 3,
    confidence_threshold: float = 0.5,
    title: str = "Where the network looks",
) -> str:
    """
    Args:
        predictions: of the pictures, by the names under which they are shown.
        layers: how many deformable convolutions to follow, from the last one.
        confidence_threshold: detections below it are left out, and those after the first
            ``MAX_DETECTIONS``.
        title: of the page.

    Returns:
        The page's text, HTML. Offsets are in int16 or, where a picture has many, in int8: off by at
        most their largest one / 65,534, or / 254.

    Raises:
        ValueError: there is no prediction or no layer; offsets are not finite.
    """
    if not predictions or layers < 1:
        raise ValueError(
            f"predictions: {len(predictions)} given, layers: {layers} given, accepted: 1 or more "
            "of each"
        )
    data = {
        "title": title,
        "pictures": [
            _describe_picture(name, prediction, layers, confidence_threshold)
            for name, prediction in predictions.items()
        ],
    }
    folder = resources.files("d2_deform.visualization")
    parts = {
        "title": title.replace("&", "&amp;").replace("<", "&lt;"),
        "style": (folder / "explorer.css").read_text(encoding="utf-8"),
        "script": (folder / "explorer.js").read_text(encoding="utf-8"),
        # "</script>" in a name would end the element that holds it.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = (folder / "explorer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _describe_picture(
    name: str, prediction: SampledPrediction, layers: int, confidence_threshold: float
) -> dict[str, Any]:
    height, width = prediction.image.shape[:2]
    fields = prediction.record.fields[-layers:]
    num_bytes = sum(2 * field.offset.numel() for field in fields)
    dtype = np.dtype("<i2" if num_bytes <= MAX_OFFSET_BYTES else "<i1")
    detections = prediction.detections(confidence_threshold)[:MAX_DETECTIONS]
    bins = at_rest = None
    if prediction.has_part_bins and len(detections):
        bins, at_rest = (prediction.part_bins(detections, one) for one in (True, False))
    described = []
    for index in range(len(detections)):
        one: dict[str, Any] = {
            "label": prediction.label(detections[index]),
            "box": _rounded(detections[index].pred_boxes.tensor[0]),
        }
        if bins is not None and at_rest is not None:
            one["binShape"] = list(bins.shape[1:3])
            one["bins"] = _rounded(bins[index].flatten())
            one["binsAtRest"] = _rounded(at_rest[index].flatten())
        described.append(one)
    return {
        "name": name,
        "width": width,
        "height": height,
        "image": _as_data_uri(prediction.image),
        "ratio": list(prediction.ratio),
        "start": list(prediction.middle(confidence_threshold)),
        "layers": [
            _describe_layer(field, above, prediction.record.input_size, dtype)
            for field, above in zip(fields, [*fields[1:], None], strict=False)
        ],
        "detections": described,
    }


def _describe_layer(
    field: OffsetField,
    above: OffsetField | None,
    input_size: tuple[int, int],
    dtype: np.dtype[Any],
) -> dict[str, Any]:
    """All pairs are (y, x). Strides are in pixels of the network's input, ``step`` in cells."""
    offset = field.offset.numpy()  # (groups, taps, 2, Ho, Wo)
    largest = float(np.abs(offset).max(initial=0.0))
    if not np.isfinite(largest):
        raise ValueError(f"The offsets of {field.name} are not finite; are the weights sound?")
    scale = largest / np.iinfo(dtype).max or 1.0
    quantised = np.round(offset / scale).astype(dtype)
    step = (1.0, 1.0) if above is None else stride_between(field.output_size, above.input_size)
    layer = field.layer
    return {
        "name": field.name,
        "kernel": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": [int(one) for one in layer.padding],
        "dilation": list(layer.dilation),
        "groups": offset.shape[0],
        "outputSize": list(field.output_size),
        "outputStride": stride_between(input_size, field.output_size).tolist(),
        "inputStride": stride_between(input_size, field.input_size).tolist(),
        "step": [float(one) for one in step],
        "scale": scale,
        "bytes": dtype.itemsize,
        "offsets": base64.b64encode(quantised.tobytes()).decode("ascii"),
    }


def _as_data_uri(image: np.ndarray) -> str:
    """Of an RGB picture, as PNG or JPEG, whichever is smaller."""
    factor = MAX_PICTURE_SIDE / max(image.shape[:2])
    if factor < 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    encoded = {
        "jpeg": cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])[1],
        "png": cv2.imencode(".png", bgr)[1],
    }
    kind = min(encoded, key=lambda one: len(encoded[one]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind].tobytes()).decode('ascii')}"


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 2) for value in values]
