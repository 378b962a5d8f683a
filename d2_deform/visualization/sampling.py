"""Where deformable convolutions sample and where the bins of RoI pooling go (paper figures 6, 7).

Positions on feature maps are (y, x), as convolution offsets are; whatever leaves this module is
(x, y) in pixels of the network's input picture. Cell i of a map of stride s has its centre at pixel
``(i + 0.5) * s``, as in the official release's demonstration and in aligned RoI pooling.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.layers import DeformPSRoIPool, OffsetConv2d
from d2_deform.modeling.backbone import InceptionResNetBlock

__all__ = [
    "SamplingRecord",
    "draw_part_bins",
    "draw_sampling_points",
    "part_bins",
    "record_sampling",
    "trace_sampling_locations",
]

Colour = tuple[int, int, int]
SAMPLE_COLOUR: Colour = (235, 30, 40)
LOCATION_COLOUR: Colour = (40, 230, 90)
ROI_COLOUR: Colour = (40, 120, 255)


@dataclass
class _OffsetField:
    """What one offset branch predicted for one picture.

    Attributes:
        layer: the branch; has kernel, stride, padding, dilation of the convolution it serves.
        offset: (groups, taps, 2, Ho, Wo), the displacement (y, x) of every group's every tap, in
            cells of its input.
        input_size: (H, W) of its input map.
    """

    layer: OffsetConv2d
    offset: Tensor
    input_size: tuple[int, int]

    @property
    def output_size(self) -> tuple[int, int]:
        return int(self.offset.shape[-2]), int(self.offset.shape[-1])

    def sample_from(self, positions: Tensor, group: int) -> Tensor:
        """Where the convolution samples to compute its output.

        Args:
            positions: (n, 2) output positions, fractional ones too: the offset field is read there
                by bilinear interpolation, beyond its border as at its border.
            group: the deformable group.

        Returns:
            (n * taps, 2) input positions. All taps are kept, outside the map as well.
        """
        taps = torch.cartesian_prod(
            *(torch.arange(size, dtype=torch.float32) for size in self.layer.kernel_size)
        )
        steps = torch.tensor([self.layer.stride, self.layer.padding, self.layer.dilation]).float()
        stride, padding, dilation = steps
        rigid = (positions * stride - padding)[:, None] + taps * dilation
        return (rigid + _read_field(self.offset[group], positions)).flatten(0, 1)


@dataclass
class SamplingRecord:
    """What a detector's deformable layers predicted in one inference, see :func:`record_sampling`.

    Attributes:
        model: the detector.
        fields: of the backbone's deformable convolutions, in the order of their computation.
        input_size: (H, W) of the network's (padded) input.
        pool_feature: what the offsets of the pooling of class scores are predicted from.
    """

    model: nn.Module
    fields: list[_OffsetField] = field(default_factory=list)
    input_size: tuple[int, int] = (0, 0)
    pool_feature: Tensor | None = None

    def trace(self, location: tuple[float, float], layers: int = 3, group: int = 0) -> np.ndarray:
        """See :func:`trace_sampling_locations`."""
        if not self.fields:
            raise ValueError(
                "The model has no deformable convolution to trace; is MODEL.DEFORM.NUM_LAYERS 0?"
            )
        fields = self.fields[-layers:]
        for one in fields:
            if not 0 <= group < len(one.offset):
                raise ValueError(f"group: {group} given, accepted is 0 to {len(one.offset) - 1}")
        size = torch.tensor(fields[-1].output_size, dtype=torch.float32)
        pixel = torch.tensor([[location[1], location[0]]], dtype=torch.float32)
        positions = pixel / _stride(self.input_size, size) - 0.5
        above: _OffsetField | None = None
        for one in reversed(fields):
            if above is not None:
                # A 1x1 convolution with a stride may lie between the two: cell i reads cell s * i.
                size_between = torch.tensor(above.input_size, dtype=torch.float32)
                positions = positions * _stride(one.output_size, size_between)
            positions = one.sample_from(positions, group)
            above = one
        size = torch.tensor(fields[0].input_size, dtype=torch.float32)
        pixels = (positions + 0.5) * _stride(self.input_size, size)
        return pixels.flip(1).numpy()

    def part_bins(self, boxes: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
        """See :func:`part_bins`."""
        if self.pool_feature is None:
            raise ValueError(
                "The model has no deformable position-sensitive RoI pooling of class scores; it "
                "needs MODEL.ROI_HEADS.NAME RFCNROIHeads and MODEL.RFCN.DEFORM_POOL True."
            )
        pool = _score_pool(self.model)
        assert pool is not None
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4).cpu()
        labels = torch.as_tensor(classes, dtype=torch.int64).reshape(-1).cpu()
        rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
        with torch.no_grad():
            offset = pool.predict_offset(self.pool_feature, rois.to(self.pool_feature.device))
        rows, columns = pool.output_size
        offset = offset.float().cpu().view(len(boxes), pool.offset_groups, 2, rows, columns)
        # Each group serves a run of classes: its own with K = C + 1, all of them with K = 1.
        num_classes = self.model.get_submodule("roi_heads").num_classes
        group = labels * pool.offset_groups // (int(num_classes) + 1)  # type: ignore[arg-type]
        shift = pool.gamma * offset[torch.arange(len(boxes)), group]  # (R, 2, rows, columns)

        width, height = (boxes[:, 2:] - boxes[:, :2])[:, :, None, None].unbind(1)
        x1 = boxes[:, 0, None, None] + width * (torch.arange(columns) / columns + shift[:, 0])
        y1 = boxes[:, 1, None, None] + height * (torch.arange(rows)[:, None] / rows + shift[:, 1])
        return torch.stack([x1, y1, x1 + width / columns, y1 + height / rows], dim=-1)


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[SamplingRecord]:
    """Records what the deformable layers of a detector predict.

        >>> with record_sampling(predictor.model) as record:
        >>>     predictor(image)  # once, one picture
        >>> points = record.trace((x, y))

    Args:
        model: a detector in evaluation mode, e.g. ``DefaultPredictor.model``. Hooks are put on it
            and taken off again.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() first.")
    record = SamplingRecord(model)

    def keep_offset(layer: OffsetConv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        offset = layer.split(output)[0][0].detach().float().cpu()
        by_group = offset.view(layer.deform_groups, -1, 2, *offset.shape[-2:])
        record.fields.append(_OffsetField(layer, by_group, tuple(inputs[0].shape[-2:])))

    def keep_input_size(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        record.input_size = tuple(inputs[0].shape[-2:])

    def keep_pool_feature(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        record.pool_feature = inputs[0].detach()

    backbone, pool = getattr(model, "backbone", None), _score_pool(model)
    handles = []
    if backbone is not None:
        handles.append(backbone.register_forward_pre_hook(keep_input_size))
        handles += [layer.register_forward_hook(keep_offset) for layer in _offset_layers(backbone)]
    if pool is not None:
        assert pool.offset_conv is not None
        handles.append(pool.offset_conv.register_forward_pre_hook(keep_pool_feature))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _offset_layers(backbone: nn.Module) -> list[OffsetConv2d]:
    """Those that lie one behind the other: of parallel branches the longer one's."""
    beside = {
        layer
        for block in backbone.modules()
        if isinstance(block, InceptionResNetBlock)
        for layer in block.conv_a2.modules()
    }
    return [
        layer
        for layer in backbone.modules()
        if isinstance(layer, OffsetConv2d) and layer not in beside
    ]


def trace_sampling_locations(
    model: nn.Module,
    image: Tensor,
    location: tuple[float, float],
    layers: int = 3,
    group: int = 0,
) -> np.ndarray:
    """Follows one activation back through the last deformable convolutions (paper figure 6).

    With three 3x3 layers (res5c, res5b, res5a) it depends on 9**3 = 729 places. Each layer's
    offsets are read where the layer above samples, between cells by interpolation. (The release's
    demonstration rounds there, and where a tap leaves the map it gives the taps after it another
    tap's offset.) Of the two branches of Aligned-Inception-ResNet's blocks the longer one is
    followed, two layers a block.

    Args:
        model: a detector in evaluation mode, e.g. ``DefaultPredictor.model``.
        image (Tensor[3, H, W]): as the model takes it in ``{"image": ...}``: resized, 0 to 255, in
            the order of INPUT.FORMAT.
        location: (x, y) in pixels of ``image``, of the activation; it may lie between cells.
        layers: how many deformable convolutions to follow, from the last one; a model with
            fewer is followed through those that it has.
        group: which deformable group's offsets to follow.

    Returns:
        float32 (9**layers, 2): (x, y) in pixels of ``image``, some perhaps outside it.

    Raises:
        ValueError: the model has no deformable convolution.
    """
    return _record(model, image).trace(location, layers, group)


def part_bins(
    model: nn.Module, image: Tensor, boxes: Tensor, classes: Sequence[int] | Tensor
) -> Tensor:
    """Where deformable PS-RoI pooling moves the bins of a box for its class (paper figure 7).

    Args:
        model: an R-FCN in evaluation mode whose pooling is deformable.
        image (Tensor[3, H, W]): as for :func:`trace_sampling_locations`.
        boxes (Tensor[R, 4]): (x1, y1, x2, y2) in pixels of ``image``.
        classes: R class numbers.

    Returns:
        Tensor[R, Ph, Pw, 4]: every bin's (x1, y1, x2, y2) in pixels of ``image``.

    Raises:
        ValueError: the model has no deformable PS-RoI pooling of class scores.
    """
    return _record(model, image).part_bins(boxes, classes)


def draw_sampling_points(
    image: np.ndarray,
    points: np.ndarray,
    location: tuple[float, float],
    scale: float = 1.0,
) -> np.ndarray:
    """Draws sampling points in red and the location that they belong to in green.

    Args:
        image: uint8 (H, W, 3), RGB.
        points: (n, 2), (x, y) in pixels; those outside the picture are left out.
        location: (x, y) in pixels.
        scale: the result is so many times as large.

    Returns:
        A new uint8 picture, RGB.
    """
    canvas = _enlarge(image, scale)
    radius = 0.006 * min(canvas.shape[:2])
    marks = canvas.copy()
    for x, y in points:
        if 0 <= x <= image.shape[1] and 0 <= y <= image.shape[0]:
            _draw_disc(marks, x * scale, y * scale, radius, SAMPLE_COLOUR)
    canvas = cv2.addWeighted(marks, 0.75, canvas, 0.25, 0.0)
    x, y = location[0] * scale, location[1] * scale
    _draw_disc(canvas, x, y, 3.2 * radius, (255, 255, 255))
    _draw_disc(canvas, x, y, 2.4 * radius, LOCATION_COLOUR)
    return canvas


def draw_part_bins(
    image: np.ndarray, boxes: np.ndarray | Tensor, bins: np.ndarray | Tensor, scale: float = 1.0
) -> np.ndarray:
    """Draws boxes in blue and their moved bins in red.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes: (R, 4), (x1, y1, x2, y2) in pixels.
        bins: (R, Ph, Pw, 4), as :func:`part_bins` returns them.
        scale: the result is so many times as large.

    Returns:
        A new uint8 picture, RGB.
    """
    canvas = _enlarge(image, scale)
    thickness = max(round(0.004 * min(canvas.shape[:2])), 1)
    fill = canvas.copy()
    flat_bins = np.asarray(bins).reshape(-1, 4) * scale
    for corners in flat_bins:
        _draw_box(fill, corners, SAMPLE_COLOUR, cv2.FILLED)
    canvas = cv2.addWeighted(fill, 0.18, canvas, 0.82, 0.0)
    for corners in np.asarray(boxes).reshape(-1, 4) * scale:
        _draw_box(canvas, corners, ROI_COLOUR, 2 * thickness)
    for corners in flat_bins:
        _draw_box(canvas, corners, SAMPLE_COLOUR, thickness)
    return canvas


def _record(model: nn.Module, image: Tensor) -> SamplingRecord:
    with record_sampling(model) as record, torch.no_grad():
        model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    return record


def _score_pool(model: nn.Module) -> DeformPSRoIPool | None:
    """R-FCN's pooling of class scores, if it is deformable."""
    pool = getattr(getattr(model, "roi_heads", None), "cls_pool", None)
    if isinstance(pool, DeformPSRoIPool) and pool.offset_conv is not None:
        return pool
    return None


def _read_field(field: Tensor, positions: Tensor) -> Tensor:
    """Bilinear interpolation of a field (taps, 2, H, W) at (n, 2) positions: (n, taps, 2)."""
    height, width = field.shape[-2:]
    size = torch.tensor([width, height], dtype=torch.float32)
    grid = (positions.flip(1) + 0.5) * 2 / size - 1
    values = F.grid_sample(
        field.flatten(0, 1)[None],
        grid[None, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return values[0, :, 0].T.unflatten(1, (-1, 2))


def _stride(larger: tuple[int, int], smaller: Tensor) -> Tensor:
    """Cells of the larger map per cell of the smaller, (y, x); whole, as layers round sizes up."""
    return torch.round(torch.tensor(larger, dtype=torch.float32) / smaller).clamp(min=1)


def _enlarge(image: np.ndarray, scale: float) -> np.ndarray:
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)


def _draw_disc(canvas: np.ndarray, x: float, y: float, radius: float, colour: Colour) -> None:
    """A filled circle at a fractional place; OpenCV counts pixels from their centres."""
    centre = (round((x - 0.5) * 16), round((y - 0.5) * 16))
    cv2.circle(canvas, centre, max(round(radius * 16), 8), colour, -1, cv2.LINE_AA, shift=4)


def _draw_box(canvas: np.ndarray, corners: np.ndarray, colour: Colour, thickness: int) -> None:
    x1, y1, x2, y2 = (round(float(corner) - 0.5) for corner in corners)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness, cv2.LINE_AA)
