"""From a network's scored boxes to its detections."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor

__all__ = ["BoxSelector"]


class BoxSelector:
    """Chooses the detections of each image among its scored boxes.

    It is Detectron2's :func:`~detectron2.modeling.roi_heads.fast_rcnn.fast_rcnn_inference` with its
    thresholds bound.

    Shape shorthand: R boxes of one image, K foreground classes.
    """

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        topk_per_image: int = 100,
    ) -> None:
        """
        Args:
            score_thresh: only boxes that score above it are considered.
            nms_thresh: of two boxes of one class that overlap by more, the better one is kept.
            topk_per_image: detections per image at most; below 0 all.
        """
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk_per_image = topk_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
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
            ``pred_classes``; and the rows of ``boxes`` that they are (Tensor[D] of int64).
        """
        return fast_rcnn_inference(
            boxes, scores, image_shapes, self.score_thresh, self.nms_thresh, self.topk_per_image
        )
