"""Online hard example mining: every RoI is predicted, the worst predicted ones are learnt from."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OHEM", "roi_losses"]


class OHEM:
    """Chooses the RoIs with the largest losses, image by image.

    An RoI's loss is its classification's cross-entropy plus the smooth L1 of its four box deltas.
    The RoIs are those of the one forward pass: what is not chosen simply has no loss. There is no
    NMS among them. This is the official release's form (``rfcn/operator_py/box_annotator_ohem.py``)
    of Shrivastava et al., CVPR 2016, which R-FCN uses (Dai et al., NIPS 2016, section 2.3).

    The losses are then Detectron2's on the chosen RoIs: the classification's mean over them, the
    boxes' sum divided by their number. That is the release's division by 128 wherever each image
    has 128 RoIs; with fewer the release still divides the boxes' sum by 128.
    """

    @configurable
    def __init__(self, batch_size_per_image: int = 128) -> None:
        """
        Args:
            batch_size_per_image: RoIs to learn from in each image, > 0; all where there are fewer.

        Raises:
            ValueError: it is not positive.
        """
        if batch_size_per_image < 1:
            raise ValueError(
                f"batch_size_per_image: {batch_size_per_image} given, accepted is 1 or more; set "
                "MODEL.OHEM.BATCH_SIZE_PER_IMAGE"
            )
        self.batch_size_per_image = batch_size_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        _check_losses(
            cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE, cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
        )
        return {"batch_size_per_image": cfg.MODEL.OHEM.BATCH_SIZE_PER_IMAGE}

    def __call__(
        self,
        box_predictor: FastRCNNOutputLayers,
        predictions: tuple[Tensor, Tensor],
        proposals: list[Instances],
    ) -> tuple[tuple[Tensor, Tensor], list[Instances]]:
        """Chooses, and puts ``ohem/fg_fraction``, the foreground's share, into the event storage.

        Args:
            box_predictor: whose losses the choice is for.
            predictions: class logits (Tensor[R, C + 1]), background last, and box deltas
                (Tensor[R, 4] or Tensor[R, 4 * C]) of the RoIs of all images.
            proposals: these RoIs by image, with ``proposal_boxes``, ``gt_classes`` and, where the
                image has objects, ``gt_boxes``.

        Returns:
            Predictions and proposals of the chosen RoIs, those of an image by falling loss; of two
            equal losses the earlier RoI is chosen.

        Raises:
            ValueError: ``box_predictor`` has other losses than cross-entropy and smooth L1.
        """
        _check_losses(box_predictor.box_reg_loss_type, box_predictor.use_sigmoid_ce)
        rows, hard, start = [], [], 0
        for losses, of_image in zip(
            roi_losses(box_predictor, predictions, proposals), proposals, strict=True
        ):
            order = losses.argsort(descending=True, stable=True)[: self.batch_size_per_image]
            rows.append(start + order)
            hard.append(of_image[order])
            start += len(of_image)

        num_chosen = sum(len(of_image) for of_image in hard)
        if num_chosen > 0:
            num_foreground = sum(
                int((of_image.gt_classes < box_predictor.num_classes).sum()) for of_image in hard
            )
            get_event_storage().put_scalar("ohem/fg_fraction", num_foreground / num_chosen)
        scores, deltas = predictions
        chosen = torch.cat(rows)
        return (scores[chosen], deltas[chosen]), hard


@torch.no_grad()
def roi_losses(
    box_predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
) -> list[Tensor]:
    """Classification plus box loss of every RoI, weighted as ``box_predictor`` weights them.

    Args:
        box_predictor: gives the box encoding, smooth L1's beta and the losses' weights.
        predictions: as in :meth:`OHEM.__call__`.
        proposals: as in :meth:`OHEM.__call__`.

    Returns:
        Of every image Tensor[its RoIs], without gradient.
    """
    counts = [len(of_image) for of_image in proposals]
    return [
        _roi_losses_of_image(box_predictor, scores, deltas, of_image)
        for scores, deltas, of_image in zip(
            predictions[0].split(counts), predictions[1].split(counts), proposals, strict=True
        )
    ]


def _roi_losses_of_image(
    box_predictor: FastRCNNOutputLayers, scores: Tensor, deltas: Tensor, proposals: Instances
) -> Tensor:
    weight = box_predictor.loss_weight
    classes = proposals.gt_classes
    losses = F.cross_entropy(scores.float(), classes, reduction="none")
    losses = losses * weight.get("loss_cls", 1.0)
    foreground = (classes < box_predictor.num_classes).nonzero().squeeze(1)
    if len(foreground) == 0:
        return losses
    deltas = deltas.float().view(len(deltas), -1, 4)[foreground]
    column = classes[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
    targets = box_predictor.box2box_transform.get_deltas(
        proposals.proposal_boxes.tensor[foreground], proposals.gt_boxes.tensor[foreground]
    )
    box_losses = smooth_l1_loss(
        deltas[torch.arange(len(foreground), device=column.device), column],
        targets,
        beta=box_predictor.smooth_l1_beta,
    ).sum(dim=1)
    return losses.index_add(0, foreground, box_losses * weight.get("loss_box_reg", 1.0))


def _check_losses(box_reg_loss_type: str, use_sigmoid_ce: bool) -> None:
    if box_reg_loss_type != "smooth_l1" or use_sigmoid_ce:
        raise ValueError(
            "OHEM ranks RoIs by softmax cross-entropy and smooth L1: it needs "
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE 'smooth_l1' ({box_reg_loss_type!r} given) and "
            f"USE_SIGMOID_CE False ({use_sigmoid_ce} given); or set MODEL.OHEM.ENABLED False"
        )
