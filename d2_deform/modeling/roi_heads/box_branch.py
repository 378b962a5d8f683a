"""What the box branches of R-FCN and Faster R-CNN share: how they learn and how they detect."""

import sys
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .iterative_localization import localize_iteratively
from .ohem import OHEM
from .output_layers import BoxOutputLayers

__all__ = ["BoxBranch", "find_input_shapes"]


class BoxBranch(ROIHeads):
    """RoI heads whose boxes are predicted from maps that are computed once per image.

    A subclass says how, in :meth:`compute_maps` and :meth:`predict_on_maps`; this class adds online
    hard example mining and iterative localisation. Without them it learns and detects as
    Detectron2's ``StandardROIHeads``, in front of which it may stand as a base class.
    """

    box_predictor: BoxOutputLayers
    # StandardROIHeads' argument: masks and keypoints learn on the box head's boxes
    train_on_pred_boxes: bool = False

    @configurable
    def __init__(self, *, ohem: OHEM | None = None, num_rounds: int = 1, **kwargs: Any) -> None:
        """
        Args:
            ohem: learn from the RoIs that it chooses among all proposals; ``batch_size_per_image``
                and ``positive_fraction`` are not used then. None: from RoIs drawn at random.
            num_rounds: rounds of localisation at inference; from 2 on the boxes of one round are
                pooled again in the next.
            **kwargs: of the next base class.

        Raises:
            ValueError: ``num_rounds`` is not positive.
        """
        if num_rounds < 1:
            raise ValueError(
                f"num_rounds: {num_rounds} given, accepted is 1 or more; set "
                "TEST.BOX_VOTING.NUM_ROUNDS"
            )
        if ohem is not None:
            # Drawing without a limit labels all proposals and drops the ignored ones.
            kwargs.update(batch_size_per_image=sys.maxsize, positive_fraction=1.0)
        super().__init__(**kwargs)
        self.ohem = ohem
        self.num_rounds = num_rounds

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any) -> dict[str, Any]:
        arguments = super().from_config(cfg, *args)
        voting = cfg.TEST.BOX_VOTING
        arguments["ohem"] = OHEM(cfg) if cfg.MODEL.OHEM.ENABLED else None
        arguments["num_rounds"] = voting.NUM_ROUNDS if voting.ENABLED else 1
        return arguments

    @abstractmethod
    def compute_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """
        Args:
            features: feature maps by name, each Tensor[N, channels, H, W].

        Returns:
            The maps that :meth:`predict_on_maps` pools from.
        """

    @abstractmethod
    def predict_on_maps(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """
        Args:
            maps: what :meth:`compute_maps` returned.
            boxes: N sets of boxes in pixels of the (padded) input images.

        Returns:
            Class logits (Tensor[R, C + 1]), background last, and box deltas (Tensor[R, 4] or
            Tensor[R, 4 * C]), in the order of the boxes.
        """

    def predict(self, features: dict[str, Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of given boxes, see :meth:`predict_on_maps`.

        Args:
            features: feature maps by name, each Tensor[N, channels, H, W].
            boxes: N sets of boxes in pixels of the (padded) input images.
        """
        return self.predict_on_maps(self.compute_maps(features), boxes)

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]) -> Any:
        """Losses in training, detections at inference; overrides StandardROIHeads' method.

        With OHEM the list ``proposals`` holds afterwards the RoIs learnt from, so that mask and
        keypoint heads learn from the same.
        """
        predict = partial(self.predict_on_maps, self.compute_maps(features))
        if not self.training:
            boxes, scores = localize_iteratively(
                predict, self.box_predictor, proposals, self.num_rounds
            )
            image_sizes = [of_image.image_size for of_image in proposals]
            return self.box_predictor.box_selector(boxes, scores, image_sizes)[0]

        predictions = predict([of_image.proposal_boxes for of_image in proposals])
        if self.ohem is not None:
            predictions, proposals[:] = self.ohem(self.box_predictor, predictions, proposals)
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                predicted = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for of_image, boxes_of_image in zip(proposals, predicted, strict=True):
                of_image.proposal_boxes = Boxes(boxes_of_image)
        return losses


def find_input_shapes(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """Shapes of the maps that MODEL.ROI_HEADS.IN_FEATURES names.

    Args:
        cfg: read for that key.
        input_shape: shapes of the backbone's maps by name.

    Raises:
        ValueError: the backbone gives no map of such a name.
    """
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    for name in names:
        if name not in input_shape:
            raise ValueError(
                f"the backbone gives {sorted(input_shape)}, not MODEL.ROI_HEADS.IN_FEATURES' "
                f"{name!r}; name it in MODEL.RESNETS.OUT_FEATURES"
            )
    return [input_shape[name] for name in names]
