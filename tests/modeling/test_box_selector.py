"""BoxSelector: Detectron2's own choice without an option; soft-NMS and voting with it."""

import math

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from torch import Tensor

from d2_deform.config import add_deform_config
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.box_voting import BoxVoting
from d2_deform.modeling.soft_nms import SoftNMS

NUM_CLASSES, SHAPES = 3, [(60, 80), (90, 50)]


def make_predictions(class_specific: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Of two images; boxes leave them, and one row of each holds a NaN or an infinity."""
    generator = torch.Generator().manual_seed(0)
    boxes, scores = [], []
    for count, bad in ((40, math.nan), (25, math.inf)):
        columns = NUM_CLASSES if class_specific else 1
        corners = torch.rand(count, columns, 2, generator=generator) * 60 - 5
        sizes = 10 + torch.rand(count, columns, 2, generator=generator) * 40
        boxes.append(torch.cat([corners, corners + sizes], dim=2).flatten(start_dim=1))
        scores.append(torch.randn(count, NUM_CLASSES + 1, generator=generator).softmax(dim=1))
        boxes[-1][3, 0] = bad
    return boxes, scores


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("topk", [5, -1])
def test_plain_is_detectron2s(class_specific: bool, topk: int) -> None:
    boxes, scores = make_predictions(class_specific)
    selector = BoxSelector(score_thresh=0.1, nms_thresh=0.4, topk_per_image=topk)
    given, given_rows = selector(copies(boxes), copies(scores), SHAPES)
    wanted, wanted_rows = fast_rcnn_inference(copies(boxes), copies(scores), SHAPES, 0.1, 0.4, topk)
    for one, other in zip(given, wanted, strict=True):
        assert len(one) > 0 and one.image_size == other.image_size
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)
    for rows, other_rows in zip(given_rows, wanted_rows, strict=True):
        assert torch.equal(rows, other_rows)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize(
    ("nms_thresh", "soft_nms"),
    [(0.4, None), (1e-9, SoftNMS(sigma=1e-9, min_score=0.1))],
    ids=["hard", "soft that suppresses at any overlap"],
)
def test_options_that_change_nothing(
    class_specific: bool, nms_thresh: float, soft_nms: SoftNMS | None
) -> None:
    boxes, scores = make_predictions(class_specific)
    thresholds = {"score_thresh": 0.1, "nms_thresh": nms_thresh, "topk_per_image": 8}
    selector = BoxSelector(**thresholds, soft_nms=soft_nms, box_voting=BoxVoting(iou_thresh=0.999))
    given, given_rows = selector(copies(boxes), copies(scores), SHAPES)
    wanted, wanted_rows = BoxSelector(**thresholds)(copies(boxes), copies(scores), SHAPES)
    for index in range(len(SHAPES)):
        assert torch.equal(given_rows[index], wanted_rows[index])
        assert torch.equal(given[index].pred_classes, wanted[index].pred_classes)
        assert torch.equal(given[index].scores, wanted[index].scores)
        torch.testing.assert_close(given[index].pred_boxes.tensor, wanted[index].pred_boxes.tensor)


def test_soft_nms_then_voting_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 8], [20.0, 0, 35, 10], [0.0, 0, 10, 9]])
    scores = torch.tensor([[0.8, 0.0], [0.4, 0.0], [0.6, 0.0], [0.04, 0.0]])
    selector = BoxSelector(
        topk_per_image=2, soft_nms=SoftNMS(sigma=0.5, min_score=0.05), box_voting=BoxVoting()
    )
    (detections,), (rows,) = selector([boxes], [scores], [(50, 30)])
    # Row 3 is below score_thresh and has no vote; row 1, 0.4 * exp(-0.8^2 / 0.5) = 0.11, is the
    # third best, but it votes with its first score, 0.4. Row 2 is clipped to the picture.
    assert rows.tolist() == [0, 2]
    assert detections.scores.tolist() == pytest.approx([0.8, 0.6])
    expected = torch.tensor([[0.0, 0, 10, (0.8 * 10 + 0.4 * 8) / 1.2], [20.0, 0, 30, 10]])
    torch.testing.assert_close(detections.pred_boxes.tensor, expected)

    selector.topk_per_image, selector.box_voting = -1, None
    (detections,), (rows,) = selector([boxes], [scores], [(50, 30)])
    assert rows.tolist() == [0, 2, 1]
    assert detections.scores.tolist() == pytest.approx([0.8, 0.6, 0.4 * math.exp(-1.28)])


def test_voting_leaves_scores_and_classes_apart() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 8]])
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.6, 0.0]])
    selector = BoxSelector(box_voting=BoxVoting())
    (detections,), _ = selector([boxes], [scores], [(50, 50)])
    assert detections.scores.tolist() == pytest.approx([0.9, 0.6])
    assert detections.pred_classes.tolist() == [0, 1]
    bottoms = detections.pred_boxes.tensor[:, 3].tolist()
    assert bottoms == pytest.approx([(0.9 * 10 + 0.3 * 8) / 1.2, (0.1 * 10 + 0.6 * 8) / 0.7])


@pytest.mark.parametrize(
    "options",
    [{}, {"soft_nms": SoftNMS()}, {"box_voting": BoxVoting()}],
    ids=["plain", "soft-NMS", "voting"],
)
@pytest.mark.parametrize("count", [0, 4])
def test_no_detections(options: dict, count: int) -> None:
    boxes, scores = torch.rand(count, 4 * NUM_CLASSES), torch.zeros(count, NUM_CLASSES + 1)
    (detections,), (rows,) = BoxSelector(**options)([boxes], [scores], [(50, 50)])
    assert len(detections) == 0 and rows.shape == (0,)
    assert detections.pred_boxes.tensor.shape == (0, 4)


def make_cfg() -> CfgNode:
    cfg = get_cfg()
    add_deform_config(cfg)
    return cfg


def test_from_config() -> None:
    cfg = make_cfg()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.3
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    assert vars(BoxSelector(cfg)) == {
        "score_thresh": 0.01,
        "nms_thresh": 0.3,
        "topk_per_image": 300,
        "soft_nms": None,
        "box_voting": None,
    }
    cfg.TEST.SOFT_NMS.ENABLED = True
    cfg.TEST.BOX_VOTING.ENABLED = True
    selector = BoxSelector(cfg)
    assert isinstance(selector.soft_nms, SoftNMS) and selector.soft_nms.min_score == 0.01
    assert isinstance(selector.box_voting, BoxVoting)
