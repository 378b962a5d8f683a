"""From a network's scored boxes to its detections."""

import math
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_deform.modeling.box_voting import BoxVoting
from d2_deform.modeling.soft_nms import SoftNMS

__all__ = ["BoxSelector"]


class BoxSelector:
    """Chooses the detections of each image among its scored boxes.

    It is Detectron2's :func:`~detectron2.modeling.roi_heads.fast_rcnn.fast_rcnn_inference` with its
    thresholds bound, and two choices beside it: soft-NMS in place of non-maximum suppression, and
    box voting after either. With neither, the result is that function's.

    Shape shorthand: R boxes of one image, K foreground classes, D detections.
    """

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        topk_per_image: int = 100,
        soft_nms: SoftNMS | None = None,
        box_voting: BoxVoting | None = None,
    ) -> None:
        """
        Args:
            score_thresh: only boxes that score above it are considered.
            nms_thresh: of two boxes of one class that overlap by more, the better one is kept;
                above 1 none is suppressed. ``soft_nms`` does not read it.
            topk_per_image: detections per image at most; below 0 all.
            soft_nms: lowers the scores of overlapping boxes instead.
            box_voting: refines the detections by the boxes above ``score_thresh``.
        """
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk_per_image = topk_per_image
        self.soft_nms = soft_nms
        self.box_voting = box_voting

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "soft_nms": SoftNMS(cfg) if cfg.TEST.SOFT_NMS.ENABLED else None,
            "box_voting": BoxVoting(cfg) if cfg.TEST.BOX_VOTING.ENABLED else None,
        }

    def __call__(
        self, boxes: list[Tensor], scores: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Instances], list[Tensor]]:
        """
        Args:
            boxes: of every image Tensor[R, 4], or Tensor[R, K * 4] with one box per class;
                (x1, y1, x2, y2) in pixels of the image.
            scores: of every image Tensor[R, K + 1]; the last column, background, is not read.
            image_shapes: (height, width) of every image; boxes are clipped to it.

        Returns:
            Of every image its detections, best first, with ``pred_boxes``, ``scores`` and
            ``pred_classes``; and the rows of ``boxes`` they come from (Tensor[D] of int64), counted
            without rows that hold a NaN or an infinity.
        """
        if self.soft_nms is None and self.box_voting is None:
            return fast_rcnn_inference(
                boxes, scores, image_shapes, self.score_thresh, self.nms_thresh, self.topk_per_image
            )
        # No two boxes overlap by more than infinity: these are all above the threshold.
        candidates, rows = fast_rcnn_inference(
            boxes, scores, image_shapes, self.score_thresh, nms_thresh=math.inf, topk_per_image=-1
        )
        selected = [self.select(candidates_of_image) for candidates_of_image in candidates]
        return (
            [detections for detections, _ in selected],
            [row[kept] for row, (_, kept) in zip(rows, selected, strict=True)],
        )

    def select(self, candidates: Instances) -> tuple[Instances, Tensor]:
        """Suppression and voting among boxes of one image that have a class already.

        Args:
            candidates: R instances with ``pred_boxes``, ``scores`` and ``pred_classes``;
                ``score_thresh`` is not applied to them.

        Returns:
            The detections, best first, and the rows of ``candidates`` they come from (Tensor[D]).
        """
        boxes, scores = candidates.pred_boxes.tensor, candidates.scores
        classes = candidates.pred_classes
        if self.soft_nms is None:
            kept = batched_nms(boxes, scores, classes, self.nms_thresh)
            if self.topk_per_image >= 0:
                kept = kept[: self.topk_per_image]
            detections = candidates[kept]
        else:
            kept, new_scores = self.soft_nms(boxes, scores, classes, topk=self.topk_per_image)
            detections = candidates[kept]
            detections.scores = new_scores
        if self.box_voting is not None:
            detections.pred_boxes = Boxes(
                self.box_voting(
                    detections.pred_boxes.tensor, detections.pred_classes, boxes, scores, classes
                )
            )
        return detections, kept
