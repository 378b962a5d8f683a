"""Where deformable convolutions sample and where the bins of RoI pooling go (paper figures 4 to 7).

Positions on feature maps are (y, x), as convolution offsets are; whatever leaves this module is
(x, y) in pixels of the network's input picture. Cell i of a map of stride s has its centre at pixel
``(i + 0.5) * s``, as in the official release's demonstration and in aligned RoI pooling.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.layers import OffsetConv2d
from d2_deform.modeling.backbone import InceptionResNetBlock
from d2_deform.visualization.bin_shift import (
    find_deformable_pool,
    keep_pool_maps,
    predict_bin_shift,
)

__all__ = [
    "OffsetField",
    "SamplingRecord",
    "has_deformable_layer",
    "part_bins",
    "record_sampling",
    "stride_between",
    "trace_sampling_locations",
]


@dataclass
class OffsetField:
    """What one offset branch predicted for one picture.

    Attributes:
        name: of the layer in words, "res5c".
        layer: the branch; has kernel, stride, padding, dilation of the convolution it serves.
        offset: (groups, taps, 2, Ho, Wo), the displacement (y, x) of every group's every tap, in
            cells of its input.
        input_size: (H, W) of its input map.
    """

    name: str
    layer: OffsetConv2d
    offset: Tensor
    input_size: tuple[int, int]

    @property
    def output_size(self) -> tuple[int, int]:
        return int(self.offset.shape[-2]), int(self.offset.shape[-1])

    def sample_from(self, positions: Tensor, group: int, deformed: bool = True) -> Tensor:
        """Where the convolution samples to compute its output.

        Args:
            positions: (n, 2) output positions, fractional ones too: the offset field is read there
                by bilinear interpolation, beyond its border as at its border.
            group: the deformable group.
            deformed: False leaves the offsets out.

        Returns:
            (n * taps, 2) input positions. All taps are kept, outside the map as well.
        """
        taps = torch.cartesian_prod(
            *(torch.arange(size, dtype=torch.float32) for size in self.layer.kernel_size)
        )
        steps = torch.tensor([self.layer.stride, self.layer.padding, self.layer.dilation]).float()
        stride, padding, dilation = steps
        samples = (positions * stride - padding)[:, None] + taps * dilation
        if deformed:
            samples = samples + _read_field(self.offset[group], positions)
        return samples.flatten(0, 1)

    def effective_dilation(self, position: Tensor, group: int) -> float:
        """Mean distance of adjacent sampling locations of the filter at a position (paper table 2).

        Adjacent are a tap and its neighbour in the row or in the column, 12 pairs of a 3x3 filter,
        so that an undeformed filter of dilation d has exactly d.

        Args:
            position: (2,) output position, (y, x).
            group: the deformable group.

        Returns:
            In cells of the input map; NaN for a filter of a single tap.
        """
        taps = self.sample_from(position[None], group).view(*self.layer.kernel_size, 2)
        steps = [(taps[1:] - taps[:-1]).flatten(0, 1), (taps[:, 1:] - taps[:, :-1]).flatten(0, 1)]
        return float(torch.cat(steps).norm(dim=1).mean())


@dataclass
class SamplingRecord:
    """What a network's deformable layers predicted in one inference, see :func:`record_sampling`.

    Attributes:
        model: the network.
        fields: of the backbone's deformable convolutions, in the order of their computation.
        input_size: (H, W) of the network's (padded) input.
        pool_maps: what the offsets of RoI pooling are predicted from; None: rigid, or not reached.
    """

    model: nn.Module
    fields: list[OffsetField] = field(default_factory=list)
    input_size: tuple[int, int] = (0, 0)
    pool_maps: list[Tensor] | None = None

    def trace(
        self,
        location: tuple[float, float],
        layers: int = 3,
        group: int = 0,
        deformed: bool = True,
    ) -> np.ndarray:
        """See :func:`trace_sampling_locations`.

        ``deformed`` False gives the pattern of the same layers without their offsets.
        """
        if not self.fields:
            raise ValueError(
                "The model has no deformable convolution to trace; is MODEL.DEFORM.NUM_LAYERS 0?"
            )
        if layers < 1:
            raise ValueError(f"layers: {layers} given, accepted is 1 or more")
        fields = self.fields[-layers:]
        for one in fields:
            _check(one, group)
        positions = self.position(fields[-1], location)[None]
        above: OffsetField | None = None
        for one in reversed(fields):
            if above is not None:
                # A 1x1 convolution with a stride may lie between the two: cell i reads cell s * i.
                positions = positions * stride_between(one.output_size, above.input_size)
            positions = one.sample_from(positions, group, deformed)
            above = one
        pixels = (positions + 0.5) * stride_between(self.input_size, fields[0].input_size)
        return pixels.flip(1).numpy()

    def effective_dilation(
        self, field: OffsetField, location: tuple[float, float], group: int = 0
    ) -> float:
        """Of a layer's filter at a place, see :meth:`OffsetField.effective_dilation`.

        Args:
            field: one of ``fields``.
            location: (x, y) in pixels of the network's input.
            group: the deformable group.
        """
        _check(field, group)
        return field.effective_dilation(self.position(field, location), group)

    def position(self, field: OffsetField, location: tuple[float, float]) -> Tensor:
        """The (y, x) on a layer's output map of (x, y) in pixels of the network's input."""
        pixel = torch.tensor([location[1], location[0]], dtype=torch.float32)
        return pixel / stride_between(self.input_size, field.output_size) - 0.5

    def part_bins(
        self, boxes: Tensor, classes: Sequence[int] | Tensor, deformed: bool = True
    ) -> Tensor:
        """See :func:`part_bins`; ``deformed`` False gives the bins at rest."""
        if self.pool_maps is None:
            raise ValueError(
                "The model has no deformable RoI pooling; it needs MODEL.ROI_HEADS.NAME "
                "RFCNROIHeads and MODEL.RFCN.DEFORM_POOL True, or DeformROIHeads and "
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE DeformRoIPool."
            )
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4).cpu()
        labels = torch.as_tensor(classes, dtype=torch.int64).reshape(-1).cpu()
        shift = predict_bin_shift(self.model, self.pool_maps, boxes, labels)
        if not deformed:
            shift = torch.zeros_like(shift)
        rows, columns = shift.shape[-2:]
        width, height = (boxes[:, 2:] - boxes[:, :2])[:, :, None, None].unbind(1)
        x1 = boxes[:, 0, None, None] + width * (torch.arange(columns) / columns + shift[:, 0])
        y1 = boxes[:, 1, None, None] + height * (torch.arange(rows)[:, None] / rows + shift[:, 1])
        return torch.stack([x1, y1, x1 + width / columns, y1 + height / rows], dim=-1)


@contextmanager
def record_sampling(model: nn.Module, every_layer: bool = False) -> Iterator[SamplingRecord]:
    """Records what the deformable layers of a network predict.

        >>> with record_sampling(predictor.model) as record:
        >>>     predictor(image)  # once, one picture
        >>> points = record.trace((x, y))

    Args:
        model: in evaluation mode, with a child ``backbone``, e.g. ``DefaultPredictor.model``. Hooks
            are put on it and taken off again.
        every_layer: of the two branches of Aligned-Inception-ResNet's blocks record both, and not
            only the longer one, which :meth:`SamplingRecord.trace` follows.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() first.")
    record = SamplingRecord(model)
    backbone = getattr(model, "backbone", None)
    layers = {} if backbone is None else _offset_layers(backbone, every_layer)

    def keep_offset(layer: OffsetConv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        offset = layer.split(output)[0][0].detach().float().cpu()
        by_group = offset.view(layer.deform_groups, -1, 2, *offset.shape[-2:])
        input_size = tuple(inputs[0].shape[-2:])
        record.fields.append(OffsetField(layers[layer], layer, by_group, input_size))

    def keep_input_size(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        record.input_size = tuple(inputs[0].shape[-2:])

    def keep_maps(maps: list[Tensor]) -> None:
        record.pool_maps = maps

    handles = []
    if backbone is not None:
        handles.append(backbone.register_forward_pre_hook(keep_input_size))
        handles += [layer.register_forward_hook(keep_offset) for layer in layers]
    if find_deformable_pool(model) is not None:
        handles.append(keep_pool_maps(model, keep_maps))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def has_deformable_layer(model: nn.Module) -> bool:
    """Whether there is anything for :func:`record_sampling` to record."""
    backbone = getattr(model, "backbone", None)
    return bool(backbone is not None and _offset_layers(backbone)) or (
        find_deformable_pool(model) is not None
    )


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
        model: a network in evaluation mode, e.g. ``DefaultPredictor.model``.
        image (Tensor[3, H, W]): as the model takes it in ``{"image": ...}``: resized, 0 to 255, in
            the order of INPUT.FORMAT.
        location: (x, y) in pixels of ``image``, of the activation; it may lie between cells.
        layers: how many deformable convolutions to follow, from the last one; a model with
            fewer is followed through those that it has.
        group: which deformable group's offsets to follow.

    Returns:
        float32 (9**layers, 2): (x, y) in pixels of ``image``, some perhaps outside it. The last
        layer's tap counts slowest.

    Raises:
        ValueError: the model has no deformable convolution.
    """
    return _record(model, image).trace(location, layers, group)


def part_bins(
    model: nn.Module, image: Tensor, boxes: Tensor, classes: Sequence[int] | Tensor
) -> Tensor:
    """Where deformable (PS-)RoI pooling moves the bins of a box for its class (paper figure 7).

    R-FCN moves them differently for every class, Faster R-CNN alike for all.

    Args:
        model: an R-FCN or Faster R-CNN in evaluation mode whose pooling is deformable.
        image (Tensor[3, H, W]): as for :func:`trace_sampling_locations`.
        boxes (Tensor[R, 4]): (x1, y1, x2, y2) in pixels of ``image``.
        classes: R class numbers.

    Returns:
        Tensor[R, Ph, Pw, 4]: every bin's (x1, y1, x2, y2) in pixels of ``image``.

    Raises:
        ValueError: the model has no deformable RoI pooling.
    """
    return _record(model, image).part_bins(boxes, classes)


def _record(model: nn.Module, image: Tensor) -> SamplingRecord:
    with record_sampling(model) as record, torch.no_grad():
        model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    return record


def _check(field: OffsetField, group: int) -> None:
    if not 0 <= group < len(field.offset):
        raise ValueError(f"group: {group} given, accepted is 0 to {len(field.offset) - 1}")
    if not field.offset.isfinite().all():
        raise ValueError(f"The offsets of {field.name} are not finite; are the weights sound?")


def _offset_layers(backbone: nn.Module, every_layer: bool = False) -> dict[OffsetConv2d, str]:
    """With their names; unless every one is asked for, of parallel branches the longer one's."""
    beside = (
        set()
        if every_layer
        else {
            layer
            for block in backbone.modules()
            if isinstance(block, InceptionResNetBlock)
            for layer in block.conv_a2.modules()
        }
    )
    return {
        layer: _name_as_in_paper(name, backbone)
        for name, layer in backbone.named_modules()
        if isinstance(layer, OffsetConv2d) and layer not in beside
    }


def _name_as_in_paper(name: str, backbone: nn.Module) -> str:
    """Such that "res5.2.conv2_offset" is "res5c", as a bottleneck has one 3x3 convolution only;
    other blocks' convolutions are named too, "res5b conv1"."""
    found = re.search(r"^(.*(res\d)\.(\d+))\.(\w+?)(?:_offset|\.conv_offset)$", name)
    if found is None:
        return name
    path, stage, block, convolution = found.groups()
    title = stage + (chr(ord("a") + int(block)) if int(block) < 26 else f".{block}")
    is_bottleneck = hasattr(backbone.get_submodule(path), "conv3")
    return title if is_bottleneck else f"{title} {convolution}"


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


def stride_between(larger: tuple[int, int], smaller: tuple[int, int]) -> Tensor:
    """Cells of the larger map per cell of the smaller, (y, x); whole, as layers round sizes up."""
    ratio = torch.tensor(larger, dtype=torch.float32) / torch.tensor(smaller, dtype=torch.float32)
    return ratio.round().clamp(min=1)
