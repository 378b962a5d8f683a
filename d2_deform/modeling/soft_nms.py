"""Soft-NMS: overlapping boxes lose score instead of their place."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

__all__ = ["SoftNMS", "soft_nms"]

METHODS = ("gaussian", "linear")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    method: str = "gaussian",
    sigma: float = 0.6,
    iou_thresh: float = 0.3,
    min_score: float = 0.001,
    topk: int = -1,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS of Bodla et al. (ICCV 2017), for each class by itself.

    The best box is taken, the scores of the others of its class are multiplied by

        "gaussian":  exp(-IoU^2 / sigma)
        "linear":    1 - IoU where IoU > iou_thresh, else 1

    with IoU to the box taken, and so on until none is left above ``min_score``. Scores of the boxes
    taken never rise, so that ``topk`` rounds give the ``topk`` best of all classes.

    Args:
        boxes: Tensor[R, 4], (x1, y1, x2, y2).
        scores: Tensor[R].
        classes: Tensor[R] of integers.
        method: "gaussian" or "linear".
        sigma: of the Gaussian; the paper has 0.5, the official release's FPN 0.6.
        iou_thresh: where the linear penalty starts.
        min_score: boxes end when their score is not above it.
        topk: boxes to return at most; below 0 all.

    Returns:
        Rows of the boxes taken (Tensor[D] of int64), best first, and their new scores (Tensor[D]).
    """
    boxes = boxes.float()  # areas overflow in half precision
    remaining = scores.clone()
    kept, kept_scores = [], []
    for _ in range(len(boxes) if topk < 0 else min(topk, len(boxes))):
        score, best = remaining.max(dim=0)
        if not score > min_score:
            break
        kept.append(best)
        kept_scores.append(score)
        same_class = (classes == classes[best]).nonzero()[:, 0]
        iou = pairwise_iou(Boxes(boxes[best][None]), Boxes(boxes[same_class]))[0]
        if method == "gaussian":
            factor = torch.exp(-(iou**2) / sigma)
        else:
            factor = torch.where(iou > iou_thresh, 1 - iou, 1.0)
        remaining[same_class] *= factor.to(remaining)
        remaining[best] = float("-inf")
    if not kept:
        return classes.new_zeros(0, dtype=torch.int64), scores.new_zeros(0)
    return torch.stack(kept), torch.stack(kept_scores)


class SoftNMS:
    """:func:`soft_nms` with its settings bound (config keys under ``TEST.SOFT_NMS``)."""

    @configurable
    def __init__(
        self,
        *,
        method: str = "gaussian",
        sigma: float = 0.6,
        iou_thresh: float = 0.3,
        min_score: float = 0.001,
    ) -> None:
        """
        Args:
            method, sigma, iou_thresh, min_score: as :func:`soft_nms` takes them.

        Raises:
            ValueError: the method is unknown or sigma is not positive.
        """
        if method not in METHODS:
            raise ValueError(
                f"unknown soft-NMS method {method!r}; TEST.SOFT_NMS.METHOD is one of {METHODS}"
            )
        if not sigma > 0:
            raise ValueError(
                f"soft-NMS needs a positive sigma, got {sigma}; set TEST.SOFT_NMS.SIGMA"
            )
        self.method = method
        self.sigma = sigma
        self.iou_thresh = iou_thresh
        self.min_score = min_score

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "method": cfg.TEST.SOFT_NMS.METHOD,
            "sigma": cfg.TEST.SOFT_NMS.SIGMA,
            "iou_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "min_score": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        }

    def __call__(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, topk: int = -1
    ) -> tuple[Tensor, Tensor]:
        """See :func:`soft_nms`."""
        return soft_nms(
            boxes,
            scores,
            classes,
            method=self.method,
            sigma=self.sigma,
            iou_thresh=self.iou_thresh,
            min_score=self.min_score,
            topk=topk,
        )
