"""Recall of proposals, by hand and against Detectron2's COCO evaluation of them."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, BoxMode, Instances

from d2_deform.evaluation import ProposalEvaluator
from d2_deform.evaluation.proposal_evaluation import best_overlaps

NAME = "boxes_of_a_test"


def annotation(corners, **flags):
    return {"bbox": corners, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **flags}


def output(*boxes):
    found = Instances((100, 100))
    found.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.objectness_logits = torch.arange(len(boxes), 0, -1).float()
    return {"proposals": found}


@pytest.fixture
def evaluate():
    """Registers records and evaluates one output for each."""

    def run(records, outputs):
        DatasetCatalog.register(NAME, lambda: records)
        evaluator = ProposalEvaluator(NAME)
        evaluator.reset()
        for record, found in zip(records, outputs, strict=True):
            evaluator.process([{"image_id": record["image_id"]}], [found])
        return evaluator.evaluate()["box_proposals"], evaluator

    yield run
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def test_best_overlaps():
    objects = Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]))
    proposals = Boxes(torch.tensor([[0.0, 0.0, 10.0, 6.0], [0.0, 0.0, 10.0, 8.0]]))
    torch.testing.assert_close(best_overlaps(proposals, objects), torch.tensor([0.8, 0.0]))
    assert best_overlaps(Boxes(torch.zeros(0, 4)), objects).tolist() == [0, 0]
    assert best_overlaps(proposals, Boxes(torch.zeros(0, 4))).tolist() == []


def test_by_hand(evaluate):
    records = [
        {
            "image_id": "a",
            "annotations": [
                annotation([0, 0, 10, 10]),  # 0.8 of it is covered
                annotation([50, 50, 60, 60]),  # nothing of it
                annotation([20, 20, 30, 30], iscrowd=1),
                annotation([20, 20, 30, 30], difficult=True),
            ],
        },
        {"image_id": "b", "annotations": [annotation([0, 0, 10, 10])]},  # 0.6 of it
        {"image_id": "c", "annotations": [annotation([0, 0, 10, 10])]},  # no proposal at all
        {"image_id": "d", "annotations": []},
    ]
    outputs = [
        output([0, 0, 10, 8], [0, 0, 10, 2]),
        output([0, 0, 10, 6]),
        output(),
        output([0, 0, 1, 1]),
    ]
    results, evaluator = evaluate(records, outputs)
    assert results["R50"] == pytest.approx(50)  # 2 of 4
    assert results["R70"] == pytest.approx(25)  # 1 of 4
    # 0.5, 0.55 and 0.6: 2 of 4; 0.65 to 0.8: 1 of 4; none above
    assert results["AR"] == pytest.approx((3 * 50 + 4 * 25) / 10, abs=1e-4)
    assert results["proposals"] == pytest.approx(1)
    assert list(evaluator.proposals) == ["a", "b", "c", "d"]


def test_a_data_set_without_ground_truth(evaluate):
    results, _ = evaluate([{"image_id": 3}], [output([0, 0, 1, 1], [0, 0, 2, 2])])
    assert results == {"proposals": 2}


class CocoApi:
    """As much of pycocotools as Detectron2's function asks for."""

    def __init__(self, boxes):
        self.boxes = boxes

    def getAnnIds(self, imgIds):
        return [imgIds]

    def loadAnns(self, ids):
        return [
            {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0, "area": (x2 - x1) * (y2 - y1)}
            for x1, y1, x2, y2 in self.boxes[ids[0]]
        ]


def test_as_detectron2_where_no_proposal_covers_two_objects(evaluate):
    generator = torch.Generator().manual_seed(0)
    corners, outputs = [], []
    for _ in range(10):
        # Objects in cells of 20 pixels of their own, each with three proposals within its cell.
        cells = torch.randperm(25, generator=generator)[:6]
        origins = 20.0 * torch.stack([cells % 5, cells // 5], dim=1)
        size = 8 + 10 * torch.rand(6, 2, generator=generator)
        corners.append(torch.cat([origins, origins + size], dim=1).tolist())
        origins = origins.repeat(3, 1) + 2 * torch.rand(18, 2, generator=generator)
        size = 8 + 9 * torch.rand(18, 2, generator=generator)
        outputs.append(output(*torch.cat([origins, origins + size], dim=1).tolist()))
    records = [
        {"image_id": number, "annotations": [annotation(box) for box in boxes]}
        for number, boxes in enumerate(corners)
    ]
    results, _ = evaluate(records, outputs)
    theirs = _evaluate_box_proposals(
        [{"image_id": n, **found} for n, found in enumerate(outputs)], CocoApi(corners)
    )
    assert 10 < results["R70"] < results["R50"] < 100
    assert results["R50"] == pytest.approx(100 * theirs["recalls"][0].item(), abs=1e-3)
    assert results["R70"] == pytest.approx(100 * theirs["recalls"][4].item(), abs=1e-3)
    assert results["AR"] == pytest.approx(100 * theirs["ar"].item(), abs=1e-3)
