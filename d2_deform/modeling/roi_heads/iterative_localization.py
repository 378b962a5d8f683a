"""Iterative localisation: predict, pool again from the predicted boxes, predict again."""

from collections.abc import Callable

import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["localize_iteratively"]


def localize_iteratively(
    predict: Callable[[list[Boxes]], tuple[Tensor, Tensor]],
    box_predictor: FastRCNNOutputLayers,
    proposals: list[Instances],
    num_rounds: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Predicts boxes and scores in rounds; each round's RoIs are the boxes of the round before.

    Table 5 of the paper ("iterative bounding box average") names Gidaris and Komodakis, ICCV 2015,
    and no numbers. Of that, this is the form of He et al., CVPR 2016, appendix B: the new RoIs get
    new scores and new boxes, and the rounds' predictions are united; NMS and box voting on the
    union are ``BoxSelector``'s. An RoI with a box for each class passes on that of its best
    foreground class. Regressed boxes are clipped to the image; one that lies outside of it or is
    not finite is no RoI of the next round.

    Args:
        predict: gives the class logits (Tensor[R, C + 1]), background last, and box deltas
            (Tensor[R, 4] or Tensor[R, 4 * C]) of every image's boxes in one.
        box_predictor: turns them into probabilities and boxes.
        proposals: of every image, with ``proposal_boxes``; there may be none.
        num_rounds: 1 predicts once.

    Returns:
        Of every image the boxes (Tensor[R', 4] or Tensor[R', 4 * C]), in pixels, and probabilities
        (Tensor[R', C + 1]) of all rounds, one round after the other.
    """
    boxes: list[list[Tensor]] = []
    scores: list[list[Tensor]] = []
    for number in range(num_rounds):
        if number > 0:
            proposals = [
                _regressed(its_boxes, its_scores, of_image.image_size)
                for its_boxes, its_scores, of_image in zip(
                    boxes[-1], scores[-1], proposals, strict=True
                )
            ]
        predictions = predict([of_image.proposal_boxes for of_image in proposals])
        boxes.append(box_predictor.predict_boxes(predictions, proposals))
        scores.append(box_predictor.predict_probs(predictions, proposals))
    return (
        [torch.cat(of_image) for of_image in zip(*boxes, strict=True)],
        [torch.cat(of_image) for of_image in zip(*scores, strict=True)],
    )


def _regressed(boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Instances:
    """One image's predictions (Tensor[R, B], Tensor[R, C + 1]) as proposals."""
    num_boxes = boxes.shape[1] // 4
    if num_boxes > 1:
        best = scores[:, :-1].argmax(dim=1)
        row = torch.arange(len(boxes), device=boxes.device)
        boxes = boxes.view(len(boxes), num_boxes, 4)[row, best]
    regressed = Boxes(boxes[boxes.isfinite().all(dim=1)])
    regressed.clip(image_size)
    return Instances(image_size, proposal_boxes=regressed[regressed.nonempty()])
