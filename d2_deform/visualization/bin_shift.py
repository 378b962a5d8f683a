"""How far deformable RoI pooling moves the bins of a box: R-FCN's and Faster R-CNN's alike."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2_deform.layers import DeformPSRoIPool, DeformRoIPool
from d2_deform.modeling.roi_heads import DeformROIPooler

__all__ = ["find_deformable_pool", "keep_pool_maps", "predict_bin_shift"]


def find_deformable_pool(model: nn.Module) -> DeformPSRoIPool | DeformROIPooler | None:
    """R-FCN's pooling of class scores or Faster R-CNN's box pooler, if it is deformable."""
    heads = getattr(model, "roi_heads", None)
    pool = getattr(heads, "cls_pool", None)
    if isinstance(pool, DeformPSRoIPool) and pool.offset_conv is not None:
        return pool
    pooler = getattr(heads, "box_pooler", None)
    return pooler if isinstance(pooler, DeformROIPooler) else None


def keep_pool_maps(model: nn.Module, keep: Callable[[list[Tensor]], None]) -> RemovableHandle:
    """Hands the maps that the offsets are predicted from to ``keep``, whenever the model runs."""
    pool = find_deformable_pool(model)
    if isinstance(pool, DeformPSRoIPool):
        assert pool.offset_conv is not None

        def keep_feature(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep([inputs[0].detach()])

        return pool.offset_conv.register_forward_pre_hook(keep_feature)

    def keep_levels(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep([level.detach() for level in inputs[0]])

    assert pool is not None
    return pool.register_forward_pre_hook(keep_levels)


@torch.no_grad()
def predict_bin_shift(
    model: nn.Module, maps: list[Tensor], boxes: Tensor, classes: Tensor
) -> Tensor:
    """
    Args:
        model: whose pooling is deformable.
        maps: of one picture, from :func:`keep_pool_maps`.
        boxes (Tensor[R, 4]): on CPU, (x1, y1, x2, y2) in pixels of the network's input.
        classes (Tensor[R]): whose bins R-FCN moves; Faster R-CNN's move alike for all.

    Returns:
        Tensor[R, 2, Ph, Pw] on CPU: along x in widths, along y in heights of the box.
    """
    pool = find_deformable_pool(model)
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1).to(maps[0].device)
    if isinstance(pool, DeformPSRoIPool):
        num_classes = int(model.get_submodule("roi_heads").num_classes)  # type: ignore[arg-type]
        offset = pool.predict_offset(maps[0], rois).float().cpu()
        by_group = offset.view(len(boxes), pool.offset_groups, 2, *pool.output_size)
        # Each group serves a run of classes: its own with K = C + 1, all of them with K = 1.
        group = classes * pool.offset_groups // (num_classes + 1)
        return pool.gamma * by_group[torch.arange(len(boxes)), group]
    assert pool is not None
    shift = boxes.new_zeros(len(boxes), 2, *pool.output_size)
    for level, (layer, level_map) in enumerate(zip(pool.level_poolers, maps, strict=True)):
        assert isinstance(layer, DeformRoIPool)
        chosen = _levels(pool, boxes) == level
        offset = layer.predict_offset(level_map, rois[chosen.to(rois.device)])
        shift[chosen] = layer.gamma * offset.float().cpu()
    return shift


def _levels(pooler: DeformROIPooler, boxes: Tensor) -> Tensor:
    """Which map each box is pooled from, as ``ROIPooler.forward`` has it."""
    if len(pooler.level_poolers) == 1 or len(boxes) == 0:
        return boxes.new_zeros(len(boxes), dtype=torch.int64)
    return assign_boxes_to_levels(
        [Boxes(boxes)],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
