"""From scored boxes to proposals and detections, in tensors alone and without a branch on data.

What Detectron2 and :class:`~d2_deform.modeling.box_selector.BoxSelector` do, for one picture: the
same boxes in the same order. Theirs ask the data (is any box infinite? do some have no area?) which
way to go, and a network that does so has no graph.

Shape shorthand: R boxes, K foreground classes, D detections.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from d2_deform.modeling.box_selector import BoxSelector

__all__ = ["clip", "find_detections", "find_proposals", "select", "top"]

Size = tuple[int, int]


def top(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The best of ``scores`` (Tensor[R]) and their indices, best first; all if fewer."""
    # A tensor while torch.jit.trace runs, a symbol in torch.export
    count: Any = scores.shape[0]
    count = count.clamp(max=most) if isinstance(count, Tensor) else torch.sym_min(count, most)
    return scores.topk(count)


def clip(boxes: Tensor, size: Size) -> Tensor:
    """Boxes (Tensor[..., 4]: x1, y1, x2, y2) cut to a picture of ``size`` (height, width)."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [
            x1.clamp(min=0, max=width),
            y1.clamp(min=0, max=height),
            x2.clamp(min=0, max=width),
            y2.clamp(min=0, max=height),
        ],
        dim=-1,
    )


def find_proposals(
    boxes: Sequence[Tensor],
    logits: Sequence[Tensor],
    size: Size,
    *,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_size: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As ``find_top_rpn_proposals`` of Detectron2 at test.

    Args:
        boxes: of every feature map Tensor[R, 4], in pixels.
        logits: theirs, Tensor[R].
        size: (height, width) of the picture.
        nms_thresh, pre_nms_topk, post_nms_topk, min_size: as that function takes them.

    Returns:
        Boxes (Tensor[D, 4]), best first, and their logits (Tensor[D]).
    """
    kept_boxes, kept_logits = [], []
    for of_map, its_logits in zip(boxes, logits, strict=True):
        its_logits, index = top(its_logits, pre_nms_topk)
        of_map = of_map[index]
        finite = of_map.isfinite().all(dim=1) & its_logits.isfinite()
        of_map = clip(of_map, size)
        kept = (finite & _has_area(of_map, min_size)).nonzero()[:, 0]
        of_map, its_logits = of_map[kept], its_logits[kept]
        kept = _suppress(of_map, its_logits, nms_thresh)
        kept_boxes.append(of_map[kept])
        kept_logits.append(its_logits[kept])
    best = torch.cat(kept_logits).argsort(descending=True)[:post_nms_topk]
    return torch.cat(kept_boxes)[best], torch.cat(kept_logits)[best]


def find_detections(
    boxes: Tensor, scores: Tensor, size: Size, selector: BoxSelector
) -> tuple[Tensor, Tensor, Tensor]:
    """As the selector itself, for one picture.

    Args:
        boxes: Tensor[R, 4], or Tensor[R, K * 4] with one box per class, in pixels.
        scores: Tensor[R, K + 1]; the last column, background, is not read.
        size: (height, width) of the picture.
        selector: its thresholds and its vote.

    Returns:
        As :func:`select`.
    """
    num_boxes = boxes.shape[1] // 4
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    above = (scores[:, :-1] > selector.score_thresh) & finite[:, None]
    row, classes = above.nonzero().unbind(1)
    boxes = boxes.reshape(-1, num_boxes, 4)
    candidates = boxes[row, 0] if num_boxes == 1 else boxes[row, classes]
    return select(clip(candidates, size), scores[row, classes], classes, selector)


def select(
    boxes: Tensor, scores: Tensor, classes: Tensor, selector: BoxSelector
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppression and voting, as ``BoxSelector.select``, then only boxes that have an area.

    Args:
        boxes: Tensor[R, 4], inside the picture.
        scores: Tensor[R].
        classes: Tensor[R] of int64.
        selector: its threshold, its limit and its vote. Soft-NMS is a loop over the data and is
            refused where a network is prepared.

    Returns:
        Boxes (Tensor[D, 4]), best first, their scores (Tensor[D]) and classes (Tensor[D]).
    """
    # torchvision's way under tracing: each class is moved to a place of its own. The zero is for
    # no boxes at all.
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    apart = boxes + (classes.to(boxes) * reach)[:, None]
    # An overlap is never above 1, and ONNX accepts no threshold above.
    kept = _suppress(apart, scores, min(selector.nms_thresh, 1.0))
    if selector.topk_per_image >= 0:
        kept = kept[: selector.topk_per_image]
    selected = boxes[kept]
    if selector.box_voting is not None:
        selected = _vote(
            selected, classes[kept], boxes, scores, classes, selector.box_voting.iou_thresh
        )
    scores, classes = scores[kept], classes[kept]
    kept = _has_area(selected, 0.0).nonzero()[:, 0]
    return selected[kept], scores[kept], classes[kept]


def _suppress(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """``nms`` of boxes inside a picture, which may leave none.

    torchvision (0.29) tells ``torch.export`` that two boxes are left at least, and the program
    checks that. So there are two more, outside the picture, with the lowest score: they come last.
    """
    beyond = torch.tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]]).to(boxes)
    lowest = scores.new_full((2,), -math.inf)
    return nms(torch.cat([boxes, beyond]), torch.cat([scores, lowest]), iou_thresh)[:-2]


def _vote(
    boxes: Tensor,
    classes: Tensor,
    candidate_boxes: Tensor,
    candidate_scores: Tensor,
    candidate_classes: Tensor,
    iou_thresh: float,
) -> Tensor:
    """:func:`~d2_deform.modeling.box_voting.box_voting` with all classes at a time."""
    agree = box_iou(boxes, candidate_boxes) > iou_thresh
    agree = agree & (classes[:, None] == candidate_classes[None, :])
    weights = torch.where(agree, candidate_scores.relu()[None, :], 0.0)
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights @ candidate_boxes / total, boxes)


def _has_area(boxes: Tensor, min_size: float) -> Tensor:
    """Whether boxes (Tensor[R, 4]) are wider and higher than ``min_size``."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x2 - x1 > min_size) & (y2 - y1 > min_size)
