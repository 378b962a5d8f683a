"""Iterative localisation with boxes worked out by hand, and in both heads."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROIHeads, build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from d2_deform import add_deform_config
from d2_deform.modeling.roi_heads import localize_iteratively

PICTURE_SIZE = (100, 160)
NUM_CLASSES = 2


def make_predictor(agnostic: bool = True) -> FastRCNNOutputLayers:
    return FastRCNNOutputLayers(
        ShapeSpec(channels=1),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        num_classes=NUM_CLASSES,
        cls_agnostic_bbox_reg=agnostic,
    )


def make_proposals(*boxes: list[list[float]]) -> list[Instances]:
    return [
        Instances(PICTURE_SIZE, proposal_boxes=Boxes(torch.tensor(of_image).view(-1, 4)))
        for of_image in boxes
    ]


class Shifter:
    """Predicts the same deltas and class logits for every RoI; remembers the RoIs."""

    def __init__(self, deltas: list[float], scores: list[float]) -> None:
        self.deltas, self.scores = torch.tensor(deltas), torch.tensor(scores)
        self.rois: list[list[Tensor]] = []

    def __call__(self, boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        self.rois.append([of_image.tensor.clone() for of_image in boxes])
        count = sum(len(of_image) for of_image in boxes)
        return self.scores.expand(count, -1), self.deltas.expand(count, -1)


RIGHT, DOWN = [0.1, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]


def test_rounds_by_hand() -> None:
    predict = Shifter(RIGHT, [0.0, 1.0, 0.0])
    proposals = make_proposals([[10, 10, 30, 40], [0, 0, 50, 50]], [[20, 20, 30, 30]])
    boxes, scores = localize_iteratively(predict, make_predictor(), proposals, 3)
    # Widths 20, 50 and 10 stay; each round moves the box by a tenth of it.
    first = [
        *([12, 10, 32, 40], [5, 0, 55, 50]),
        *([14, 10, 34, 40], [10, 0, 60, 50]),
        *([16, 10, 36, 40], [15, 0, 65, 50]),
    ]
    second = [[21, 20, 31, 30], [22, 20, 32, 30], [23, 20, 33, 30]]
    for ours, expected in zip(boxes, (first, second), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32))
    for ours, count in zip(scores, (6, 3), strict=True):
        expected = torch.tensor([0.0, 1.0, 0.0]).softmax(dim=0).expand(count, -1)
        torch.testing.assert_close(ours, expected)
    for number in (1, 2):  # every round pools from what the round before predicted
        for image, count in ((0, 2), (1, 1)):
            torch.testing.assert_close(
                predict.rois[number][image],
                boxes[image][(number - 1) * count : number * count],
            )


@pytest.mark.parametrize("scores, moved", [([1.0, 0.0, 9.0], RIGHT), ([0.0, 1.0, 9.0], DOWN)])
def test_the_best_foreground_class_gives_the_roi(scores: list[float], moved: list[float]) -> None:
    """Class 0 says right, class 1 says down; the background, however likely, says nothing."""
    predict = Shifter([*RIGHT, *DOWN], scores)
    boxes, _ = localize_iteratively(
        predict, make_predictor(agnostic=False), make_proposals([[10, 10, 30, 40]]), 2
    )
    assert boxes[0].shape == (2, 8)
    expected = [12.0, 10, 32, 40] if moved == RIGHT else [10.0, 13, 30, 43]
    torch.testing.assert_close(predict.rois[1][0], torch.tensor([expected]))


def test_boxes_outside_of_the_image_are_clipped_or_left_out() -> None:
    predict = Shifter([1.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    proposals = make_proposals([[40, 10, 100, 40], [100, 10, 140, 40], [0, 0, 20, 20]])
    boxes, scores = localize_iteratively(predict, make_predictor(), proposals, 2)
    # Moved by 90, 60 and 30 pixels: cut at 160, wholly outside, inside
    expected = torch.tensor([[130.0, 10, 160, 40], [30, 0, 50, 20]])
    torch.testing.assert_close(predict.rois[1][0], expected)
    assert len(boxes[0]) == len(scores[0]) == 5


def test_boxes_that_are_not_finite_are_left_out() -> None:
    predict = Shifter([float("nan"), 0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    boxes, _ = localize_iteratively(
        predict, make_predictor(), make_proposals([[10, 10, 30, 40]]), 2
    )
    assert len(predict.rois[1][0]) == 0 and len(boxes[0]) == 1


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("proposals", [([], []), ([], [[10, 10, 30, 40]])])
def test_images_without_proposals(agnostic: bool, proposals: tuple) -> None:
    predict = Shifter(RIGHT if agnostic else [*RIGHT, *DOWN], [0.0, 1.0, 0.0])
    boxes, scores = localize_iteratively(
        predict, make_predictor(agnostic), make_proposals(*proposals), 2
    )
    for image, of_image in enumerate(proposals):
        assert boxes[image].shape == (2 * len(of_image), 4 if agnostic else 8)
        assert scores[image].shape == (2 * len(of_image), NUM_CLASSES + 1)


# ---------------------------------------------------------------------------- in the heads


def make_cfg(name: str, *opts) -> CfgNode:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 5
    cfg.MODEL.RFCN.CONV_DIM = cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM = 6
    cfg.merge_from_list(list(opts))
    return cfg


VOTING = ["TEST.BOX_VOTING.ENABLED", True, "TEST.BOX_VOTING.NUM_ROUNDS", 2]
HEADS = ["RFCNROIHeads", "DeformROIHeads"]


def make_heads(cfg: CfgNode) -> ROIHeads:
    heads = build_roi_heads(cfg, {"res5": ShapeSpec(channels=8, stride=16)}).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return heads


def make_inputs() -> tuple[ImageList, dict[str, Tensor], list[Instances]]:
    generator = torch.Generator().manual_seed(1)
    features = {"res5": torch.randn(2, 8, 7, 10, generator=generator)}
    images = ImageList(torch.zeros(2, 3, *PICTURE_SIZE), [PICTURE_SIZE] * 2)
    proposals = make_proposals(
        [[10, 10, 50, 60], [30, 20, 140, 90], [0, 0, 159, 99]], [[60, 30, 130, 80]]
    )
    return images, features, proposals


@pytest.mark.parametrize("name", HEADS)
def test_rounds_of_the_config(name: str) -> None:
    assert make_heads(make_cfg(name)).num_rounds == 1
    assert make_heads(make_cfg(name, *VOTING)).num_rounds == 2
    with pytest.raises(ValueError, match=r"TEST\.BOX_VOTING\.NUM_ROUNDS"):
        make_heads(make_cfg(name, "TEST.BOX_VOTING.ENABLED", True, VOTING[2], 0))


@pytest.mark.parametrize("name", HEADS)
def test_one_round_is_the_predictors_inference(name: str) -> None:
    heads = make_heads(make_cfg(name))
    images, features, proposals = make_inputs()
    found, _ = heads(images, features, proposals)
    predictions = heads.predict(features, [one.proposal_boxes for one in proposals])
    expected, _ = heads.box_predictor.inference(predictions, proposals)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 0
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_two_rounds_select_from_the_union(name: str, agnostic: bool) -> None:
    cfg = make_cfg(name, *VOTING, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    heads = make_heads(cfg)
    images, features, proposals = make_inputs()
    calls = []
    heads.conv_new.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found, _ = heads(images, features, proposals)
    assert len(calls) == 1  # the maps are those of the first round
    assert all(len(of_image) > 0 for of_image in found)

    # By hand: predict, move the RoIs, predict, unite
    predictor = heads.box_predictor
    union: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for index in range(2):
            rois, of_rounds = proposals[index].proposal_boxes, []
            for _ in range(2):
                one = [Instances(PICTURE_SIZE, proposal_boxes=rois)]
                maps = {"res5": features["res5"][index : index + 1]}
                predictions = heads.predict(maps, [rois])
                boxes = predictor.predict_boxes(predictions, one)[0]
                scores = predictor.predict_probs(predictions, one)[0]
                of_rounds.append((boxes, scores))
                best = scores[:, :NUM_CLASSES].argmax(dim=1).tolist()
                rois = Boxes(
                    torch.stack(
                        [
                            row if agnostic else row[4 * k : 4 * k + 4]
                            for row, k in zip(boxes, best, strict=True)
                        ]
                    )
                )
                rois.clip(PICTURE_SIZE)
            union.append(tuple(torch.cat(parts) for parts in zip(*of_rounds, strict=True)))
    expected, _ = predictor.box_selector(
        [boxes for boxes, _ in union], [scores for _, scores in union], [PICTURE_SIZE] * 2
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)


@pytest.mark.parametrize("name", HEADS)
def test_heads_without_proposals(name: str) -> None:
    heads = make_heads(make_cfg(name, *VOTING))
    images, features, _ = make_inputs()
    for proposals in (make_proposals([], []), make_proposals([], [[60, 30, 130, 80]])):
        found, _ = heads(images, features, proposals)
        assert len(found) == 2 and len(found[0]) == 0
