"""Fast R-CNN's outputs with the plugin's choice of detections."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor

from d2_deform.modeling.box_selector import BoxSelector

__all__ = ["BoxOutputLayers"]


class BoxOutputLayers(FastRCNNOutputLayers):
    """Detectron2's two linear layers and their losses; a ``BoxSelector`` chooses the detections."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, box_selector: BoxSelector | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            input_shape: of the features of one RoI.
            box_selector: chooses the detections among the predicted boxes. None: Detectron2's
                choice, with the arguments ``test_score_thresh``, ``test_nms_thresh`` and
                ``test_topk_per_image``, which are not used otherwise.
            **kwargs: see :class:`~detectron2.modeling.roi_heads.FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, **kwargs)
        self.box_selector = box_selector or BoxSelector(
            score_thresh=self.test_score_thresh,
            nms_thresh=self.test_nms_thresh,
            topk_per_image=self.test_topk_per_image,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        arguments["box_selector"] = BoxSelector(cfg)
        return arguments

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """
        Args:
            predictions: what :meth:`forward` returns.
            proposals: of every image, with ``proposal_boxes``.

        Returns:
            As :meth:`BoxSelector.__call__`.
        """
        return self.box_selector(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [one.image_size for one in proposals],
        )
