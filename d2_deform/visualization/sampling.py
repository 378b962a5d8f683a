"""Where deformable convolutions sample and where the bins of RoI pooling go (paper figures 6, 7).

Positions on feature maps are (y, x), as convolution offsets are; whatever leaves this module is
(x, y) in pixels of the network's input picture. Cell i of a map of stride s has its centre at pixel
``(i + 0.5) * s``, as in the official release's demonstration and in aligned RoI pooling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.layers import DeformPSRoIPool, OffsetConv2d
from d2_deform.ops import deform_ps_roi_pool

__all__ = [
    "draw_part_bins",
    "draw_sampling_points",
    "has_deform_convs",
    "has_deform_pooling",
    "part_bins",
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
        offset: (taps, 2, Ho, Wo), the displacement (y, x) of every tap, in cells of its input.
        input_size: (H, W) of its input map.
    """

    layer: OffsetConv2d
    offset: Tensor
    input_size: tuple[int, int]

    @property
    def output_size(self) -> tuple[int, int]:
        return int(self.offset.shape[-2]), int(self.offset.shape[-1])

    def sample_from(self, positions: Tensor) -> Tensor:
        """Where the convolution samples to compute its output.

        Args:
            positions: (n, 2) output positions, fractional ones too: the offset field is read there
                by bilinear interpolation, beyond its border as at its border.

        Returns:
            (n * taps, 2) input positions. All taps are kept, outside the map as well.
        """
        taps = torch.cartesian_prod(
            *(torch.arange(size, dtype=torch.float32) for size in self.layer.kernel_size)
        )
        steps = torch.tensor([self.layer.stride, self.layer.padding, self.layer.dilation]).float()
        stride, padding, dilation = steps
        rigid = (positions * stride - padding)[:, None] + taps * dilation
        return (rigid + _read_field(self.offset, positions)).flatten(0, 1)


def has_deform_convs(model: nn.Module) -> bool:
    """Whether :func:`trace_sampling_locations` has something to trace."""
    backbone = getattr(model, "backbone", None)
    return backbone is not None and any(
        isinstance(layer, OffsetConv2d) for layer in backbone.modules()
    )


def has_deform_pooling(model: nn.Module) -> bool:
    """Whether :func:`part_bins` has bins that move."""
    pool = getattr(getattr(model, "roi_heads", None), "cls_pool", None)
    return isinstance(pool, DeformPSRoIPool) and pool.offset_conv is not None


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
    tap's offset.)

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
    if not has_deform_convs(model):
        raise ValueError(
            "The model has no deformable convolution to trace; is MODEL.DEFORM.NUM_LAYERS 0?"
        )
    fields, input_size = _record_offset_fields(model, image, group)
    fields = fields[-layers:]
    size = torch.tensor(fields[-1].output_size, dtype=torch.float32)
    pixel = torch.tensor([[location[1], location[0]]], dtype=torch.float32)
    positions = pixel / _stride(input_size, size) - 0.5
    above: _OffsetField | None = None
    for field in reversed(fields):
        if above is not None:
            # A 1x1 convolution with a stride may lie between the two: cell i reads cell s * i.
            size_between = torch.tensor(above.input_size, dtype=torch.float32)
            positions = positions * _stride(field.output_size, size_between)
        positions = field.sample_from(positions)
        above = field
    size = torch.tensor(fields[0].input_size, dtype=torch.float32)
    pixels = (positions + 0.5) * _stride(input_size, size)
    return pixels.flip(1).numpy()


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
    pool = _score_pool(model)
    assert pool.offset_conv is not None
    feature = _record_input(model, image, pool.offset_conv)
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4).cpu()
    labels = torch.as_tensor(classes, dtype=torch.int64).reshape(-1).cpu()
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
    with torch.no_grad():
        offset = deform_ps_roi_pool(
            pool.offset_conv(feature),
            rois.to(feature.device),
            None,
            pool.output_size,
            pool.group_size,
            pool.spatial_scale,
            pool.sampling_ratio,
            pool.gamma,
            pool.aligned,
        )
    rows, columns = pool.output_size
    offset = offset.float().cpu().view(len(boxes), pool.offset_groups, 2, rows, columns)
    # Each group serves a run of classes: its own with K = C + 1, all of them with K = 1.
    num_scores = int(model.get_submodule("roi_heads").num_classes) + 1  # type: ignore[arg-type]
    group = labels * pool.offset_groups // num_scores
    shift = pool.gamma * offset[torch.arange(len(boxes)), group]  # (R, 2, rows, columns)

    width, height = (boxes[:, 2:] - boxes[:, :2])[:, :, None, None].unbind(1)
    x1 = boxes[:, 0, None, None] + width * (torch.arange(columns) / columns + shift[:, 0])
    y1 = boxes[:, 1, None, None] + height * (torch.arange(rows)[:, None] / rows + shift[:, 1])
    return torch.stack([x1, y1, x1 + width / columns, y1 + height / rows], dim=-1)


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


def _record_offset_fields(
    model: nn.Module, image: Tensor, group: int
) -> tuple[list[_OffsetField], tuple[int, int]]:
    """Runs the backbone on one picture.

    Returns:
        The offset fields in the order in which they were computed, and the (padded) size of the
        network's input.
    """
    fields: list[_OffsetField] = []
    input_sizes: list[tuple[int, int]] = []

    def record(layer: OffsetConv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        offset = layer.split(output)[0][0].float().cpu()
        if not 0 <= group < layer.deform_groups:
            raise ValueError(f"group: {group} given, accepted is 0 to {layer.deform_groups - 1}")
        by_group = offset.view(layer.deform_groups, -1, 2, *offset.shape[-2:])
        fields.append(_OffsetField(layer, by_group[group], tuple(inputs[0].shape[-2:])))

    def record_size(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        input_sizes.append(tuple(inputs[0].shape[-2:]))

    backbone: nn.Module = model.get_submodule("backbone")
    handles = [
        layer.register_forward_hook(record)
        for layer in backbone.modules()
        if isinstance(layer, OffsetConv2d)
    ]
    handles.append(backbone.register_forward_pre_hook(record_size))
    _run(model, image, handles)
    return fields, input_sizes[0]


def _record_input(model: nn.Module, image: Tensor, layer: nn.Module) -> Tensor:
    recorded: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        recorded.append(inputs[0])

    _run(model, image, [layer.register_forward_pre_hook(record)])
    return recorded[0]


def _run(model: nn.Module, image: Tensor, handles: list[Any]) -> None:
    """One inference with hooks, which are taken off again."""
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() first.")
    try:
        with torch.no_grad():
            model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    finally:
        for handle in handles:
            handle.remove()


def _score_pool(model: nn.Module) -> DeformPSRoIPool:
    pool = getattr(getattr(model, "roi_heads", None), "cls_pool", None)
    if not has_deform_pooling(model):
        raise ValueError(
            "The model has no deformable position-sensitive RoI pooling of class scores; it needs "
            "MODEL.ROI_HEADS.NAME RFCNROIHeads and MODEL.RFCN.DEFORM_POOL True."
        )
    assert isinstance(pool, DeformPSRoIPool)
    return pool


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
