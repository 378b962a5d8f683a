"""Box voting against numbers worked out by hand and a reference in plain Python."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import Tensor

from d2_deform.config import add_deform_config
from d2_deform.modeling.box_voting import BoxVoting, box_voting


def vote(boxes, classes, candidates, scores, candidate_classes, **settings) -> list[list[float]]:
    return box_voting(
        torch.tensor(boxes),
        torch.tensor(classes),
        torch.tensor(candidates),
        torch.tensor(scores),
        torch.tensor(candidate_classes),
        **settings,
    ).tolist()


def reference(
    boxes: Tensor, classes: Tensor, candidates: Tensor, scores: Tensor, candidate_classes: Tensor
) -> list[list[float]]:
    refined = []
    for box, label in zip(boxes.tolist(), classes.tolist(), strict=True):
        total, sums = 0.0, [0.0] * 4
        for other, score, other_label in zip(
            candidates.tolist(), scores.tolist(), candidate_classes.tolist(), strict=True
        ):
            width = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
            height = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
            areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, other)]
            overlap = width * height / (sum(areas) - width * height)
            if other_label == label and overlap > 0.5 and score > 0:
                total += score
                sums = [have + score * side for have, side in zip(sums, other, strict=True)]
        refined.append([side / total for side in sums] if total else box)
    return refined


def test_by_hand() -> None:
    candidates = [
        [0.0, 0, 10, 10],  # the box itself
        [0.0, 0, 10, 8],  # overlaps it by 0.8
        [0.0, 0, 10, 20],  # by exactly 0.5: has no vote
        [0.0, 0, 8, 10],  # by 0.8, but of another class
        [2.0, 0, 10, 10],  # by 0.8, but its score is negative
        [30.0, 30, 40, 40],
    ]
    scores, classes = [0.6, 0.2, 0.9, 0.9, -0.5, 0.9], [4, 4, 4, 1, 4, 4]
    refined = vote([candidates[0]], [4], candidates, scores, classes)
    # y2: (0.6 * 10 + 0.2 * 8) / 0.8
    assert refined == [pytest.approx([0, 0, 10, 9.5])]


def test_threshold() -> None:
    candidates, scores = [[0.0, 0, 10, 10], [0.0, 0, 10, 20]], [0.5, 0.5]
    arguments = ([candidates[0]], [0], candidates, scores, [0, 0])
    assert vote(*arguments, iou_thresh=0.5) == [[0, 0, 10, 10]]
    assert vote(*arguments, iou_thresh=0.49) == [[0, 0, 10, 15]]


def test_boxes_without_votes_stay() -> None:
    box = [[1.0, 2, 30, 40]]
    assert vote(box, [0], [[100.0, 100, 120, 120]], [0.9], [0]) == box
    assert vote(box, [0], box, [0.0], [0]) == box
    assert vote(box, [0], [[1.0, 2, 30, 40]], [0.9], [1]) == box
    empty = box_voting(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor(box),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int64),
    )
    assert empty.shape == (0, 4)


def test_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 20
    sizes = 20 + torch.rand(200, 2, generator=generator) * 20
    candidates = torch.cat([corners, corners + sizes], dim=1)
    scores = torch.rand(200, generator=generator) - 0.2
    classes = torch.randint(4, (200,), generator=generator)
    expected = reference(candidates[:20], classes[:20], candidates, scores, classes)
    given = box_voting(candidates[:20], classes[:20], candidates, scores, classes)
    torch.testing.assert_close(given, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert (given - candidates[:20]).abs().max() > 1


def test_from_config() -> None:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.TEST.BOX_VOTING.IOU_THRESH = 0.4
    voting = BoxVoting(cfg)
    assert voting.iou_thresh == 0.4
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 20]])
    classes = torch.zeros(2, dtype=torch.int64)
    refined = voting(boxes[:1], classes[:1], boxes, torch.ones(2), classes)
    assert refined.tolist() == [[0, 0, 10, 15]]


@pytest.mark.parametrize("iou_thresh", [1.0, -0.1])
def test_bad_settings_are_told(iou_thresh: float) -> None:
    with pytest.raises(ValueError, match=r"TEST.BOX_VOTING.IOU_THRESH"):
        BoxVoting(iou_thresh=iou_thresh)
