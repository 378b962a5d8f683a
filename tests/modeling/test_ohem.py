"""OHEM against Detectron2's losses of one RoI at a time, and in both heads."""

import math

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, ROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2_deform import add_deform_config
from d2_deform.modeling.roi_heads import OHEM
from d2_deform.modeling.roi_heads.ohem import roi_losses

NUM_CLASSES = 3
PICTURE_SIZE = (128, 160)


def make_predictor(**arguments) -> FastRCNNOutputLayers:
    arguments = {
        "box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "num_classes": NUM_CLASSES,
        "smooth_l1_beta": 1.0,
        "cls_agnostic_bbox_reg": True,
        **arguments,
    }
    return FastRCNNOutputLayers(ShapeSpec(channels=1), **arguments)


def make_boxes(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat(
        [corners, corners + 20 + torch.rand(count, 2, generator=generator) * 40], dim=1
    )


def make_sample(
    counts: tuple[int, ...], box_outputs: int = 4
) -> tuple[tuple[Tensor, Tensor], list[Instances]]:
    """Random predictions and labelled proposals; every third RoI is background."""
    generator = torch.Generator().manual_seed(5)
    proposals = []
    for count in counts:
        boxes = make_boxes(count, generator)
        classes = torch.arange(count) % NUM_CLASSES
        classes[::3] = NUM_CLASSES
        proposals.append(
            Instances(
                PICTURE_SIZE,
                proposal_boxes=Boxes(boxes),
                gt_boxes=Boxes(boxes + torch.randn(count, 4, generator=generator) * 3),
                gt_classes=classes,
            )
        )
    scores = torch.randn(sum(counts), NUM_CLASSES + 1, generator=generator) * 3
    deltas = torch.randn(sum(counts), box_outputs, generator=generator)
    return (scores.requires_grad_(), deltas.requires_grad_()), proposals


def losses_one_by_one(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
) -> list[list[float]]:
    """Detectron2's loss of a batch that has one RoI, for every RoI."""
    losses, row = [], 0
    for of_image in proposals:
        losses.append([])
        for i in range(len(of_image)):
            one = (predictions[0][row : row + 1], predictions[1][row : row + 1])
            with EventStorage():
                loss = predictor.losses(one, [of_image[i : i + 1]])
            losses[-1].append((loss["loss_cls"] + loss["loss_box_reg"]).item())
            row += 1
    return losses


SETTINGS = [
    {},
    {"cls_agnostic_bbox_reg": False},
    {"smooth_l1_beta": 0.0},
    {"smooth_l1_beta": 1 / 9, "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0))},
    {"loss_weight": {"loss_box_reg": 3.0, "loss_cls": 0.5}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_against_one_roi_at_a_time(settings: dict) -> None:
    predictor = make_predictor(**settings)
    box_outputs = 4 if settings.get("cls_agnostic_bbox_reg", True) else 4 * NUM_CLASSES
    predictions, proposals = make_sample((13, 9, 4), box_outputs)
    expected = losses_one_by_one(predictor, predictions, proposals)
    for ours, theirs in zip(roi_losses(predictor, predictions, proposals), expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, torch.tensor(theirs))

    with EventStorage():
        (scores, deltas), hard = OHEM(6)(predictor, predictions, proposals)
    rows, start = [], 0
    for of_image, losses in zip(hard, expected, strict=True):
        rank = sorted(range(len(losses)), key=lambda i, losses=losses: -losses[i])[:6]
        assert len(of_image) == min(6, len(losses))
        torch.testing.assert_close(
            of_image.proposal_boxes.tensor,
            Instances.cat(proposals).proposal_boxes.tensor[[start + i for i in rank]],
        )
        rows += [start + i for i in rank]
        start += len(losses)
    assert torch.equal(scores, predictions[0][rows]) and torch.equal(deltas, predictions[1][rows])


def test_a_loss_by_hand() -> None:
    """Class logits (ln 2, 0, 0, 0): foreground 0 has probability 2/5, the background 1/5."""
    boxes = Boxes(torch.tensor([[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 10.0, 20.0]]))
    shifted = Boxes(torch.tensor([[1.0, 4.0, 11.0, 24.0], [1.0, 4.0, 11.0, 24.0]]))
    proposals = Instances(
        PICTURE_SIZE, proposal_boxes=boxes, gt_boxes=shifted, gt_classes=torch.tensor([0, 3])
    )
    scores = torch.tensor([[math.log(2), 0, 0, 0]] * 2)
    deltas = torch.tensor([[0.5, 0.0, 0.0, 3.0]] * 2)
    # Targets 10 * (1 / 10, 4 / 20) = (1, 2), 0, 0; differences .5, 2, 0, 3 with beta 1
    box_loss = 0.5 * 0.5**2 + (2 - 0.5) + (3 - 0.5)
    (losses,) = roi_losses(make_predictor(), (scores, deltas), [proposals])
    torch.testing.assert_close(losses, torch.tensor([math.log(5 / 2) + box_loss, math.log(5)]))


def test_of_equal_losses_the_earlier() -> None:
    predictions, proposals = make_sample((8,))
    scores = torch.zeros_like(predictions[0])
    proposals[0].gt_classes[:] = NUM_CLASSES
    with EventStorage():
        _, (hard,) = OHEM(3)(make_predictor(), (scores, predictions[1]), proposals)
    torch.testing.assert_close(hard.proposal_boxes.tensor, proposals[0].proposal_boxes.tensor[:3])


def test_all_kept_is_detectron2s_loss() -> None:
    predictor = make_predictor()
    predictions, proposals = make_sample((13, 9))
    with EventStorage():
        expected = predictor.losses(predictions, proposals)
        losses = predictor.losses(*OHEM(128)(predictor, predictions, proposals))
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


def test_losses_are_normalised_by_the_number_kept() -> None:
    predictor = make_predictor()
    predictions, proposals = make_sample((40, 30))
    one_by_one = losses_one_by_one(predictor, predictions, proposals)
    with EventStorage():
        losses = predictor.losses(*OHEM(8)(predictor, predictions, proposals))
    expected = sum(sum(sorted(of_image)[-8:]) for of_image in one_by_one) / 16
    assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-5)


def test_only_the_kept_have_a_gradient() -> None:
    predictor = make_predictor()
    predictions, proposals = make_sample((13, 9))
    with EventStorage() as storage:
        losses = predictor.losses(*OHEM(4)(predictor, predictions, proposals))
        sum(losses.values()).backward()
        share = storage.latest()["ohem/fg_fraction"][0]
    ranked = losses_one_by_one(predictor, predictions, proposals)
    kept = set()
    for start, of_image in zip((0, 13), ranked, strict=True):
        kept |= {start + i for i in sorted(range(len(of_image)), key=of_image.__getitem__)[-4:]}
    scores, deltas = predictions
    assert set(scores.grad.any(dim=1).nonzero().flatten().tolist()) == kept
    classes = torch.cat([of_image.gt_classes for of_image in proposals])
    foreground = {i for i in kept if classes[i] < NUM_CLASSES}
    assert set(deltas.grad.any(dim=1).nonzero().flatten().tolist()) == foreground
    assert share == len(foreground) / 8 and 0 < share < 1


def test_images_without_rois() -> None:
    predictor = make_predictor()
    for counts in ((0, 0), (0, 3)):
        predictions, proposals = make_sample(counts)
        with EventStorage() as storage:
            (scores, deltas), hard = OHEM(128)(predictor, predictions, proposals)
            losses = predictor.losses((scores, deltas), hard)
        assert [len(of_image) for of_image in hard] == list(counts)
        sum(losses.values()).backward()
        assert ("ohem/fg_fraction" in storage.histories()) == (sum(counts) > 0)


def test_image_without_objects_has_no_gt_boxes() -> None:
    predictions, (proposals,) = make_sample((5,))
    proposals.gt_classes[:] = NUM_CLASSES
    proposals.remove("gt_boxes")
    with EventStorage():
        _, (hard,) = OHEM(2)(make_predictor(), predictions, [proposals])
    assert len(hard) == 2


# ---------------------------------------------------------------------------- in the heads


def make_cfg(name: str, *opts) -> CfgNode:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 4  # not used
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 5
    cfg.MODEL.RFCN.CONV_DIM = cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM = 6
    cfg.MODEL.OHEM.ENABLED = True
    cfg.MODEL.OHEM.BATCH_SIZE_PER_IMAGE = 7
    cfg.merge_from_list(list(opts))
    return cfg


def make_heads(cfg: CfgNode) -> ROIHeads:
    torch.manual_seed(0)
    return build_roi_heads(cfg, {"res5": ShapeSpec(channels=8, stride=16)})


def train(heads: ROIHeads, targets: Instances, num_proposals: int):
    generator = torch.Generator().manual_seed(1)
    proposals = Instances(
        PICTURE_SIZE,
        proposal_boxes=Boxes(make_boxes(num_proposals, generator)),
        objectness_logits=torch.ones(num_proposals),
    )
    images = ImageList(torch.zeros(1, 3, *PICTURE_SIZE), [PICTURE_SIZE])
    features = {"res5": torch.randn(1, 8, 8, 10, generator=generator)}
    with EventStorage() as storage:
        learnt, losses = heads(images, features, [proposals], [targets])
    return learnt[0], losses, storage.latest(), features


def make_targets(count: int) -> Instances:
    boxes = make_boxes(count, torch.Generator().manual_seed(9))
    masks = BitMasks(torch.ones(count, *PICTURE_SIZE, dtype=torch.bool))
    return Instances(
        PICTURE_SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.arange(count), gt_masks=masks
    )


@pytest.mark.parametrize("name", ["RFCNROIHeads", "DeformROIHeads"])
def test_heads_score_all_and_learn_from_the_hardest(name: str) -> None:
    cfg = make_cfg(name)
    heads = make_heads(cfg)
    learnt, losses, scalars, features = train(heads, make_targets(2), 50)
    assert len(learnt) == 7
    assert scalars["roi_head/num_fg_samples"][0] + scalars["roi_head/num_bg_samples"][0] == 52
    assert scalars["ohem/fg_fraction"][0] == (learnt.gt_classes < NUM_CLASSES).sum() / 7

    # The same from the parts: all labelled, each RoI's loss on its own, the seven largest
    everything = make_heads(
        make_cfg(
            name,
            *("MODEL.OHEM.ENABLED", False, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000),
            *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
        )
    )
    every, _, _, _ = train(everything, make_targets(2), 50)
    assert len(every) == 52
    predictions = everything.predict(features, [every.proposal_boxes])
    (ranked,) = losses_one_by_one(everything.box_predictor, predictions, [every])
    expected = sum(sorted(ranked)[-7:]) / 7
    assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


@pytest.mark.parametrize("name", ["RFCNROIHeads", "DeformROIHeads"])
def test_ignored_proposals_are_not_learnt_from(name: str) -> None:
    bounds = [
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.1, 0.5], "MODEL.ROI_HEADS.IOU_LABELS", [-1, 0, 1]),
        *("MODEL.OHEM.BATCH_SIZE_PER_IMAGE", 1000, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    ]
    targets = make_targets(1)
    learnt, _, _, _ = train(make_heads(make_cfg(name, *bounds)), targets, 50)
    assert 0 < len(learnt) < 50
    everything, _, _, _ = train(make_heads(make_cfg(name, *bounds[4:])), targets, 50)
    assert len(everything) == 50


def test_masks_learn_from_the_same_rois() -> None:
    cfg = make_cfg(
        "DeformROIHeads",
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 4),
        *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
    )
    heads = make_heads(cfg)
    seen: list[int] = []
    heads.mask_pooler.register_forward_pre_hook(
        lambda module, arguments: seen.extend(len(boxes) for boxes in arguments[1])
    )
    learnt, losses, _, _ = train(heads, make_targets(2), 50)
    assert seen == [int((learnt.gt_classes < NUM_CLASSES).sum())]
    assert losses["loss_mask"].isfinite()


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], "BBOX_REG_LOSS_TYPE.*'giou' given"),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True], "USE_SIGMOID_CE False"),
        (["MODEL.OHEM.BATCH_SIZE_PER_IMAGE", 0], "MODEL.OHEM.BATCH_SIZE_PER_IMAGE"),
    ],
)
def test_wrong_settings_are_named(options: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_heads(make_cfg("RFCNROIHeads", *options))


def test_a_predictor_with_other_losses_is_refused() -> None:
    predictions, proposals = make_sample((5,))
    with pytest.raises(ValueError, match="'giou' given"):
        OHEM()(make_predictor(box_reg_loss_type="giou"), predictions, proposals)
