"""Soft-NMS against numbers worked out by hand and a reference in plain Python."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from torch import Tensor

from d2_deform.config import add_deform_config
from d2_deform.modeling.soft_nms import SoftNMS, soft_nms

# Overlaps: a and b share 50 of 150, a and c nothing, b and c 50 of 150.
A, B, C = [0.0, 0, 10, 10], [5.0, 0, 15, 10], [10.0, 0, 20, 10]


def overlap(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return width * height / (sum(areas) - width * height)


def reference(boxes, scores, classes, penalty, min_score) -> list[tuple[int, float]]:
    """The paper's figure 2, class by class."""
    kept = []
    for label in set(classes):
        left = {row: scores[row] for row in range(len(boxes)) if classes[row] == label}
        while left:
            best = max(left, key=left.get)
            score = left.pop(best)
            if score <= min_score:
                break
            kept.append((best, score))
            for row in left:
                left[row] *= penalty(overlap(boxes[best], boxes[row]))
    return sorted(kept, key=lambda pair: -pair[1])


def make_boxes(count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 30
    sizes = 10 + torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + sizes], dim=1)
    scores = torch.rand(count, generator=generator)
    return boxes, scores, torch.randint(3, (count,), generator=generator)


def test_gaussian_by_hand() -> None:
    boxes, scores, classes = torch.tensor([A, B, C]), torch.tensor([0.6, 0.9, 0.5]), torch.zeros(3)
    kept, new_scores = soft_nms(boxes, scores, classes, sigma=0.5)
    # b first; a and c overlap it by a third, and each other not at all.
    factor = math.exp(-((1 / 3) ** 2) / 0.5)
    assert kept.tolist() == [1, 0, 2]
    assert new_scores.tolist() == pytest.approx([0.9, 0.6 * factor, 0.5 * factor])
    assert scores.tolist() == pytest.approx([0.6, 0.9, 0.5])  # the caller's are his


def test_linear_by_hand() -> None:
    boxes, scores, classes = torch.tensor([A, B, C]), torch.tensor([0.9, 0.6, 0.5]), torch.zeros(3)
    kept, new_scores = soft_nms(boxes, scores, classes, method="linear", iou_thresh=0.3)
    # a; then c, which is untouched by a; b is 0.6 * 2/3 = 0.4 after a, and 0.4 * 2/3 after c.
    assert kept.tolist() == [0, 2, 1]
    assert new_scores.tolist() == pytest.approx([0.9, 0.5, 0.6 * (2 / 3) ** 2])

    kept, new_scores = soft_nms(boxes, scores, classes, method="linear", iou_thresh=0.4)
    assert new_scores.tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_classes_do_not_meet() -> None:
    boxes, scores = torch.tensor([A, A, A]), torch.tensor([0.5, 0.9, 0.7])
    kept, new_scores = soft_nms(boxes, scores, torch.tensor([0, 1, 2]))
    assert kept.tolist() == [1, 2, 0]
    assert new_scores.tolist() == pytest.approx([0.9, 0.7, 0.5])


def test_min_score_ends_it() -> None:
    boxes, scores = torch.tensor([A, A, C]), torch.tensor([0.9, 0.8, 0.2])
    # A copy of a box falls to 0.8 * exp(-1 / 0.5) = 0.108.
    kept, _ = soft_nms(boxes, scores, torch.zeros(3), sigma=0.5, min_score=0.11)
    assert kept.tolist() == [0, 2]
    kept, _ = soft_nms(boxes, scores, torch.zeros(3), sigma=0.5, min_score=0.10)
    assert kept.tolist() == [0, 2, 1]
    kept, _ = soft_nms(boxes, scores, torch.zeros(3), sigma=0.5, min_score=0.9)
    assert kept.tolist() == []


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_equals_the_reference(method: str) -> None:
    boxes, scores, classes = make_boxes()
    penalty = {
        "gaussian": lambda iou: math.exp(-(iou**2) / 0.6),
        "linear": lambda iou: 1 - iou if iou > 0.3 else 1.0,
    }[method]
    expected = reference(boxes.tolist(), scores.tolist(), classes.tolist(), penalty, 0.05)
    assert 10 < len(expected) < 60

    kept, new_scores = soft_nms(boxes, scores, classes, method=method, min_score=0.05)
    assert kept.tolist() == [row for row, _ in expected]
    assert new_scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-4)

    first, first_scores = soft_nms(boxes, scores, classes, method=method, min_score=0.05, topk=7)
    assert torch.equal(first, kept[:7]) and torch.equal(first_scores, new_scores[:7])


def test_no_boxes() -> None:
    kept, scores = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert kept.shape == (0,) and kept.dtype == torch.int64 and scores.shape == (0,)


def test_boxes_without_area_stay() -> None:
    boxes = torch.tensor([[3.0, 3, 3, 3], [3.0, 3, 3, 3]])
    kept, scores = soft_nms(boxes, torch.tensor([0.5, 0.4]), torch.zeros(2))
    assert kept.tolist() == [0, 1] and scores.tolist() == pytest.approx([0.5, 0.4])


def test_half_precision_boxes_do_not_overflow() -> None:
    boxes = torch.tensor([[0.0, 0, 1000, 1000], [0.0, 0, 1000, 1000]], dtype=torch.float16)
    _, scores = soft_nms(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2), sigma=0.5)
    assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-2)])


def test_from_config() -> None:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.TEST.SOFT_NMS.METHOD = "linear"
    cfg.TEST.SOFT_NMS.SIGMA = 0.7
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.2
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    built = SoftNMS(cfg)
    assert vars(built) == {"method": "linear", "sigma": 0.7, "iou_thresh": 0.2, "min_score": 0.01}
    boxes, scores, classes = make_boxes()
    expected = soft_nms(boxes, scores, classes, method="linear", iou_thresh=0.2, min_score=0.01)
    for given, wanted in zip(built(boxes, scores, classes), expected, strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize(
    ("arguments", "key"), [({"method": "cosine"}, "METHOD"), ({"sigma": 0.0}, "SIGMA")]
)
def test_bad_settings_are_told(arguments: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"TEST.SOFT_NMS.{key}"):
        SoftNMS(**arguments)
