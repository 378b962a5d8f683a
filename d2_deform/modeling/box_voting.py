"""Bounding-box voting: a detection becomes the mean of the boxes that agree with it."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

__all__ = ["BoxVoting", "box_voting"]


def box_voting(
    boxes: Tensor,
    classes: Tensor,
    candidate_boxes: Tensor,
    candidate_scores: Tensor,
    candidate_classes: Tensor,
    iou_thresh: float = 0.5,
) -> Tensor:
    """The boxes that are left after non-maximum suppression, refined by those that are not.

        box  <-  sum_j w_j candidate_j / sum_j w_j,    w_j = max(0, score_j)

    over the candidates j of the box's class with IoU > ``iou_thresh`` to the box. A box whose
    weights add up to zero stays as it is. Scores are not touched.

    The source is Gidaris & Komodakis, "Object detection via a multi-region and semantic
    segmentation-aware CNN model" (ICCV 2015), which the deformable ConvNets paper cites for its
    "iterative bounding box average" (table 5). The formula, the weights and the threshold 0.5 are
    recalled from there, not checked against its text; no code of the authors of either has been
    found.

    Args:
        boxes: Tensor[D, 4], (x1, y1, x2, y2).
        classes: theirs (Tensor[D] of integers).
        candidate_boxes: Tensor[R, 4], all boxes before non-maximum suppression.
        candidate_scores: Tensor[R], before any soft-NMS.
        candidate_classes: Tensor[R] of integers.
        iou_thresh: how much a candidate must overlap a box to vote for it.

    Returns:
        The refined boxes (Tensor[D, 4]).
    """
    refined = boxes.clone()
    for label in classes.unique():  # one class at a time: D x R overlaps may not fit the memory
        mine, voters = classes == label, candidate_classes == label
        voter_boxes = candidate_boxes[voters].float()
        iou = pairwise_iou(Boxes(boxes[mine].float()), Boxes(voter_boxes))
        weights = torch.where(iou > iou_thresh, candidate_scores[voters].float().clamp(min=0), 0.0)
        total = weights.sum(dim=1, keepdim=True)
        mean = weights @ voter_boxes / total
        refined[mine] = torch.where(total > 0, mean.to(boxes), boxes[mine])
    return refined


class BoxVoting:
    """:func:`box_voting` with its settings bound (config keys under ``TEST.BOX_VOTING``)."""

    @configurable
    def __init__(self, *, iou_thresh: float = 0.5) -> None:
        """
        Args:
            iou_thresh: as :func:`box_voting` takes it.

        Raises:
            ValueError: the threshold is not in [0, 1).
        """
        if not 0 <= iou_thresh < 1:
            raise ValueError(
                "box voting needs an overlap of at least 0 and below 1, got iou_thresh="
                f"{iou_thresh}; set TEST.BOX_VOTING.IOU_THRESH"
            )
        self.iou_thresh = iou_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"iou_thresh": cfg.TEST.BOX_VOTING.IOU_THRESH}

    def __call__(
        self,
        boxes: Tensor,
        classes: Tensor,
        candidate_boxes: Tensor,
        candidate_scores: Tensor,
        candidate_classes: Tensor,
    ) -> Tensor:
        """See :func:`box_voting`."""
        return box_voting(
            boxes,
            classes,
            candidate_boxes,
            candidate_scores,
            candidate_classes,
            iou_thresh=self.iou_thresh,
        )
