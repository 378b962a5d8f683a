"""How many objects a network's proposals cover, on any data set with boxes."""

from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor

IOU_THRESHOLDS = torch.arange(50, 100, 5) / 100  # 0.5 to 0.95, as COCO's average recall

__all__ = ["ProposalEvaluator", "best_overlaps"]


class ProposalEvaluator(DatasetEvaluator):
    """Recall of class-agnostic proposals, and the proposals themselves.

    Detectron2 measures proposals in ``COCOEvaluator`` alone, whose API finds no ground truth by
    VOC's image ids, which are words. Here the data set's own dictionaries are the ground truth:
    every box that is neither "iscrowd" nor "difficult", where the data set tells.

    Results: {"box_proposals": {"R50", "R70", "AR", "proposals"}}: the share of objects, in percent,
    that a proposal overlaps with an IoU of at least 0.5 and of at least 0.7, the mean share for
    0.5, 0.55, ..., 0.95, and the mean number of proposals of an image. Without ground truth the
    number alone. One proposal may cover several objects; COCOEvaluator's matching forbids that.

    Attributes:
        proposals: of every image by its id, on CPU, once ``evaluate`` has run in the main process:
            ``Instances`` with ``proposal_boxes`` in pixels of the original image and
            ``objectness_logits``.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered data set. It is read now.
        """
        self._ground_truth = {
            record["image_id"]: _boxes_to_find(record)
            for record in DatasetCatalog.get(dataset_name)
        }
        self.proposals: dict[int | str, Instances] = {}

    def reset(self) -> None:
        self.proposals = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with ``image_id``.
            outputs: of Detectron2's ``ProposalNetwork``: "proposals", in the original image's size.
        """
        for given, output in zip(inputs, outputs, strict=True):
            self.proposals[given["image_id"]] = output["proposals"].to("cpu")

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """See the class. None in all processes but the main one."""
        gathered = comm.gather(self.proposals)
        if not comm.is_main_process():
            return None
        self.proposals = {key: value for part in gathered for key, value in part.items()}
        results = {}
        overlaps = [
            best_overlaps(found.proposal_boxes, self._ground_truth[image_id])
            for image_id, found in self.proposals.items()
        ]
        best = torch.cat(overlaps) if overlaps else torch.empty(0)
        if len(best):
            recalls = 100 * (best[:, None] >= IOU_THRESHOLDS).float().mean(dim=0)
            results = {
                "R50": recalls[0].item(),
                "R70": recalls[4].item(),
                "AR": recalls.mean().item(),
            }
        counts = [len(found) for found in self.proposals.values()]
        results["proposals"] = sum(counts) / max(len(counts), 1)
        return {"box_proposals": results}


def best_overlaps(proposals: Boxes, objects: Boxes) -> Tensor:
    """The largest IoU of every object with any proposal; 0 where there is no proposal.

    Returns:
        Tensor[len(objects)].
    """
    if len(proposals) == 0:
        return torch.zeros(len(objects))
    return pairwise_iou(objects, proposals).max(dim=1).values


def _boxes_to_find(record: dict[str, Any]) -> Boxes:
    corners = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record.get("annotations", ())
        if not (annotation.get("iscrowd", 0) or annotation.get("difficult", False))
    ]
    return Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
