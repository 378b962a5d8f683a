"""Choosing boxes without a branch on data: Detectron2's and BoxSelector's choice."""

import math

import pytest
import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals

from d2_deform.export.selection import find_detections, find_proposals
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.box_voting import BoxVoting

SIZE = (120, 160)


def make_boxes(count, seed=0):
    """Some reach beyond the picture, some lie outside, some have no area."""
    torch.manual_seed(seed)
    corner = torch.rand(count, 2) * 200 - 20
    size = (torch.rand(count, 2) * 60 - 5).clamp(min=0)
    return torch.cat([corner, corner + size], dim=1)


def test_proposals_of_two_maps():
    boxes = [make_boxes(200), make_boxes(30, seed=1)]
    logits = [torch.randn(200), torch.randn(30)]
    boxes[0][logits[0].argmax(), 2] = math.inf
    logits[0][7] = math.nan
    settings = {"nms_thresh": 0.4, "pre_nms_topk": 100, "post_nms_topk": 40}
    (expected,) = find_top_rpn_proposals(
        [x[None] for x in boxes], [x[None] for x in logits], [SIZE], 0.4, 100, 40, 1.5, False
    )
    found, found_logits = find_proposals(boxes, logits, SIZE, min_size=1.5, **settings)
    assert len(found) == 40
    torch.testing.assert_close(found, expected.proposal_boxes.tensor)
    torch.testing.assert_close(found_logits, expected.objectness_logits)


def select_both(boxes, scores, **settings):
    selector = BoxSelector(**settings)
    (expected,), _ = selector([boxes], [scores], [SIZE])
    expected = expected[expected.pred_boxes.nonempty()]
    found = find_detections(boxes, scores, SIZE, selector)
    for given, wanted in zip(
        found, (expected.pred_boxes.tensor, expected.scores, expected.pred_classes), strict=True
    ):
        torch.testing.assert_close(given, wanted)
    return found


@pytest.mark.parametrize("boxes_per_roi", [1, 3])
@pytest.mark.parametrize("vote", [False, True])
def test_detections(boxes_per_roi, vote):
    boxes = make_boxes(100 * boxes_per_roi).reshape(100, -1)
    scores = torch.randn(100, 4).softmax(dim=1)
    boxes[3, 0] = math.nan
    scores[5] = math.inf
    settings = {"score_thresh": 0.3, "nms_thresh": 0.3, "topk_per_image": 12}
    voting = BoxVoting(iou_thresh=0.4) if vote else None
    assert len(select_both(boxes, scores, box_voting=voting, **settings)[0]) >= 4


@pytest.mark.parametrize("vote", [False, True])
def test_no_detections(vote):
    scores = torch.full((10, 4), 0.25)
    voting = BoxVoting() if vote else None
    found = select_both(make_boxes(10), scores, score_thresh=0.5, box_voting=voting)
    assert len(found[0]) == 0
    assert len(select_both(torch.zeros(0, 4), torch.zeros(0, 4))[0]) == 0


def test_no_suppression_and_no_limit():
    scores = torch.rand(20, 2)
    settings = {"score_thresh": 0.0, "nms_thresh": math.inf, "topk_per_image": -1}
    select_both(make_boxes(20), scores, **settings)
