"""The category-aware RPN by plain arguments, from a config, and in Detectron2's trainer."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, BoxMode, ImageList, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn

from d2_deform.config import add_deform_config
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.meta_arch import CategoryAwareRPN, CategoryAwareRPNHead

DATASETS = Path(os.environ.get("DETECTRON2_DATASETS", "../shared/data/datasets"))
NUM_CLASSES, STRIDE, CHANNELS = 3, 16, 8
BACKGROUND, IGNORED = NUM_CLASSES, -1
PICTURE_SIZE = (64, 80)  # height, width: 4 x 5 cells
CELLS = (4, 5)
ANCHOR = 32  # one square anchor a cell, in most tests


class OneConvolution(Backbone):
    """A backbone of stride 16 in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)
        self._out_features = ["res5"]
        self._out_feature_channels = {"res5": CHANNELS}
        self._out_feature_strides = {"res5": STRIDE}

    @property
    def size_divisibility(self) -> int:
        return STRIDE

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res5": self.conv(x)}


def make_model(anchor_sizes: tuple[int, ...] = (ANCHOR,), **overrides) -> CategoryAwareRPN:
    torch.manual_seed(0)
    arguments = {
        "backbone": OneConvolution(),
        "head": CategoryAwareRPNHead(
            in_channels=CHANNELS,
            num_anchors=len(anchor_sizes),
            num_classes=NUM_CLASSES,
            conv_dim=6,
        ),
        "head_in_features": ["res5"],
        "anchor_generator": DefaultAnchorGenerator(
            sizes=[list(anchor_sizes)], aspect_ratios=[[1.0]], strides=[STRIDE], offset=0.0
        ),
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        "num_classes": NUM_CLASSES,
        "box_selector": BoxSelector(score_thresh=0.05, nms_thresh=0.3, topk_per_image=100),
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (100.0, 100.0, 100.0),
    }
    return CategoryAwareRPN(**{**arguments, **overrides})


def make_picture(seed: int = 0, size: tuple[int, int] = PICTURE_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


def make_targets(
    boxes: list[list[float]], classes: list[int], size: tuple[int, int] = PICTURE_SIZE
) -> Instances:
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


# ---------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------


def test_head_shapes_and_names() -> None:
    head = CategoryAwareRPNHead(in_channels=8, num_anchors=5, num_classes=3, conv_dim=6)
    logits, deltas = head([torch.randn(2, 8, 4, 7), torch.randn(2, 8, 2, 3)])
    assert [tuple(x.shape) for x in logits] == [(2, 20, 4, 7), (2, 20, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(2, 20, 4, 7), (2, 20, 2, 3)]
    layers = ("conv_new", "cls_logits", "bbox_pred")
    assert set(head.state_dict()) == {f"{x}.{kind}" for x in layers for kind in ("weight", "bias")}


def test_head_starts_as_the_release() -> None:
    torch.manual_seed(0)
    head = CategoryAwareRPNHead(in_channels=64, num_anchors=9, num_classes=3, conv_dim=64)
    for name, value in head.state_dict().items():
        if name.endswith(".weight"):
            assert value.std().item() == pytest.approx(0.01, rel=0.1), name
        else:
            assert not value.any(), name


def test_head_has_a_relu_between_its_layers() -> None:
    head = CategoryAwareRPNHead(in_channels=1, num_anchors=1, num_classes=1, conv_dim=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(1.0)
    (logits,), _ = head([torch.tensor([[[[-5.0, 2.0]]]])])
    assert logits[0, 0].tolist() == [[1.0, 4.0]]  # max(0, x + 1) + 1


# ---------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------


def label(model: CategoryAwareRPN, anchors: list[list[float]], *targets: Instances):
    return model.label_and_sample_anchors([Boxes(torch.tensor(anchors))], list(targets))


def test_an_anchor_takes_the_class_of_its_object() -> None:
    objects = make_targets([[0.0, 0, 20, 20], [40, 20, 70, 60]], [2, 0])
    anchors = [
        [0.0, 0, 20, 20],  # the first object
        [40, 20, 70, 60],  # the second
        [40, 20, 70, 52],  # IoU 0.8 with the second
        [40, 20, 70, 40],  # IoU 0.5 with the second: neither object nor background
        [0, 40, 20, 60],  # touches none
    ]
    (labels,), (boxes,) = label(make_model(), anchors, objects)
    assert labels.tolist() == [2, 0, 0, IGNORED, BACKGROUND]
    assert boxes[:3].tolist() == [[0, 0, 20, 20], [40, 20, 70, 60], [40, 20, 70, 60]]


def test_the_best_anchor_of_an_object_takes_its_class_however_little_it_overlaps() -> None:
    # IoU 100 / 400; the other one's is 50 / 450
    anchors = [[0.0, 0, 10, 10], [15, 0, 25, 10]]
    (labels,), _ = label(make_model(), anchors, make_targets([[0.0, 0, 20, 20]], [1]))
    assert labels.tolist() == [1, BACKGROUND]


@pytest.mark.parametrize(
    "thresh, expected",
    [(-1, [1, BACKGROUND, BACKGROUND]), (0, [IGNORED] * 2 + [BACKGROUND]), (5, [1, IGNORED, 3])],
)
def test_anchors_outside_the_picture(thresh: float, expected: list[int]) -> None:
    # by 5 pixels, by 10, not at all; the picture is smaller than the batch's padded one
    anchors = [[-4.0, 0, 20, 20], [60, 40, 90, 60], [40, 20, 60, 40]]
    model = make_model(anchor_boundary_thresh=thresh)
    (labels,), _ = label(model, anchors, make_targets([[0.0, 0, 20, 20]], [1]))
    assert labels.tolist() == expected


def test_the_boundary_is_the_picture_and_not_the_padding() -> None:
    small = make_targets([], [], size=(32, 32))
    large = make_targets([], [], size=(64, 64))
    (in_small, in_large), _ = label(
        make_model(anchor_boundary_thresh=0), [[0.0, 0, 48, 48]], small, large
    )
    assert in_small.tolist() == [IGNORED] and in_large.tolist() == [BACKGROUND]


@pytest.mark.parametrize(
    "size, fraction, positives, negatives",
    [(10, 0.5, 5, 5), (10, 0.2, 2, 8), (40, 0.5, 12, 28), (256, 0.5, 12, 50)],
)
def test_sample(size: int, fraction: float, positives: int, negatives: int) -> None:
    anchors = [[0.0, 0, 20, 20]] * 6 + [[40, 20, 70, 60]] * 6 + [[0, 40, 20, 60]] * 50
    anchors += [[40, 20, 70, 40]] * 9  # ignored
    objects = make_targets([[0.0, 0, 20, 20], [40, 20, 70, 60]], [2, 0])
    model = make_model(batch_size_per_image=size, positive_fraction=fraction)
    (labels,), _ = label(model, anchors, objects)
    assert ((labels == 0) | (labels == 2)).sum() == positives
    assert (labels == BACKGROUND).sum() == negatives
    assert set(labels[:6].tolist()) <= {2, IGNORED} and set(labels[6:12].tolist()) <= {0, IGNORED}
    assert (labels[62:] == IGNORED).all()


# ---------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------


def slow_losses(anchors, logits, labels, deltas, gt_boxes, normalizer, beta):
    """Both losses anchor by anchor; nested lists, the feature maps joined."""
    loss_cls = loss_box = 0.0
    for picture, picture_labels in enumerate(labels):
        for index, wanted in enumerate(picture_labels):
            if wanted == IGNORED:
                continue
            scores = logits[picture][index]
            loss_cls += math.log(sum(math.exp(score) for score in scores)) - scores[wanted]
            if wanted == BACKGROUND:
                continue
            x1, y1, x2, y2 = anchors[index]
            u1, v1, u2, v2 = gt_boxes[picture][index]
            targets = (
                ((u1 + u2) - (x1 + x2)) / 2 / (x2 - x1),
                ((v1 + v2) - (y1 + y2)) / 2 / (y2 - y1),
                math.log((u2 - u1) / (x2 - x1)),
                math.log((v2 - v1) / (y2 - y1)),
            )
            for target, delta in zip(targets, deltas[picture][index], strict=True):
                error = abs(target - delta)
                loss_box += error**2 / (2 * beta) if error < beta else error - beta / 2
    return loss_cls / normalizer, loss_box / normalizer


def test_losses_are_the_rpn_s_with_a_softmax() -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def random_boxes(count: int) -> Tensor:
        corners = 30 * torch.rand(count, 2, generator=generator)
        return torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2, generator=generator)], 1)

    sizes = (5, 3)  # anchors of two feature maps
    anchors = [random_boxes(size) for size in sizes]
    logits = [random(2, size, NUM_CLASSES + 1) for size in sizes]
    deltas = [0.5 * random(2, size, 4) for size in sizes]
    labels = [
        torch.tensor([0, 3, -1, 2, 3, 1, 3, -1]),
        torch.tensor([3, 3, 3, -1, -1, 3, 2, 3]),
    ]
    gt_boxes = [random_boxes(8), random_boxes(8)]
    model = make_model(
        batch_size_per_image=16, smooth_l1_beta=0.25, loss_cls_weight=2.0, loss_box_reg_weight=3.0
    )
    with EventStorage() as storage:
        losses = model.losses([Boxes(x) for x in anchors], logits, labels, deltas, gt_boxes)
    loss_cls, loss_box = slow_losses(
        torch.cat(anchors).tolist(),
        torch.cat(logits, dim=1).tolist(),
        torch.stack(labels).tolist(),
        torch.cat(deltas, dim=1).tolist(),
        torch.stack(gt_boxes).tolist(),
        normalizer=2 * 16,
        beta=0.25,
    )
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert losses["loss_cls"].item() == pytest.approx(2 * loss_cls, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(3 * loss_box, rel=1e-5)
    scalars = storage.latest()
    assert scalars["category_aware_rpn/num_pos_anchors"][0] == 2  # 4 in 2 pictures
    assert scalars["category_aware_rpn/num_neg_anchors"][0] == 4


def test_accuracy_in_the_storage() -> None:
    labels = torch.tensor([0, 1, 2, 3, 3])
    logits = torch.eye(4)[torch.tensor([0, 3, 1, 3, 3])]  # right, missed, wrong, right, right
    with EventStorage() as storage:
        make_model().losses(
            [Boxes(torch.tensor([[0.0, 0, 9, 9]] * 5))],
            [logits[None]],
            [labels],
            [torch.zeros(1, 5, 4)],
            [torch.tensor([[0.0, 0, 9, 9]] * 5)],
        )
    scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert scalars["category_aware_rpn/cls_accuracy"] == pytest.approx(3 / 5)
    assert scalars["category_aware_rpn/fg_cls_accuracy"] == pytest.approx(1 / 3)
    assert scalars["category_aware_rpn/false_negative"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------
# From prediction maps to detections
# ---------------------------------------------------------------------------------------


class Maps:
    """Prediction maps that say background with certainty, except where a test writes."""

    def __init__(self, model: CategoryAwareRPN, num_anchors: int = 1) -> None:
        self.model = model.eval()
        self.logits = torch.zeros(1, num_anchors, NUM_CLASSES + 1, *CELLS)
        self.logits[:, :, BACKGROUND] = 20.0
        self.deltas = torch.zeros(1, num_anchors, 4, *CELLS)

    def put(self, cell, logits, deltas=(0.0, 0.0, 0.0, 0.0), anchor=0) -> None:
        row, column = cell
        self.logits[0, anchor, :, row, column] = torch.tensor(logits)
        self.deltas[0, anchor, :, row, column] = torch.tensor(deltas)

    def detect(self, image_size=PICTURE_SIZE) -> Instances:
        images = ImageList(torch.zeros(1, 3, *PICTURE_SIZE), [image_size])
        features = [torch.zeros(1, CHANNELS, *CELLS)]
        predictions = ([self.logits.flatten(1, 2)], [self.deltas.flatten(1, 2)])
        (found,) = self.model.forward_inference(images, features, predictions)
        return found


def logits_of(*probabilities: float) -> list[float]:
    return [math.log(probability) for probability in probabilities]


def test_a_map_becomes_its_box_class_and_score() -> None:
    maps = Maps(make_model())
    # The anchor of cell (2, 3) is centred on (48, 32). It goes right by half its width, up by a
    # quarter of its height, and becomes half as wide.
    maps.put((2, 3), logits_of(0.1, 0.7, 0.04, 0.16), (0.5, -0.25, math.log(0.5), 0.0))
    found = maps.detect()
    assert found.pred_classes.tolist() == [1, 0]  # 0.04 is below the threshold
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.1]))
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([[56.0, 8.0, 72.0, 40.0]]).expand(2, 4)
    )
    assert found.image_size == PICTURE_SIZE


def test_every_anchor_of_a_cell_has_its_own_channels() -> None:
    maps = Maps(make_model(anchor_sizes=(16, 48)), num_anchors=2)
    maps.put((2, 2), logits_of(0.9, 0.02, 0.02, 0.06), anchor=0)
    maps.put((2, 2), logits_of(0.02, 0.02, 0.8, 0.16), anchor=1)
    found = maps.detect()
    assert found.pred_classes.tolist() == [0, 2]
    assert found.pred_boxes.tensor.tolist() == [[24, 24, 40, 40], [8, 8, 56, 56]]


def test_boxes_end_at_the_picture() -> None:
    maps = Maps(make_model())
    maps.put((0, 0), logits_of(0.9, 0.02, 0.02, 0.06))
    maps.put((3, 4), logits_of(0.02, 0.8, 0.02, 0.16))
    found = maps.detect(image_size=(60, 70))
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 16, 16], [48, 32, 70, 60]]


def test_suppression_is_within_a_class() -> None:
    maps = Maps(make_model(anchor_sizes=(32, 36)), num_anchors=2)  # IoU 0.79
    maps.put((2, 2), logits_of(0.5, 0.02, 0.4, 0.08), anchor=0)
    maps.put((2, 2), logits_of(0.6, 0.02, 0.02, 0.36), anchor=1)
    found = maps.detect()
    assert found.pred_classes.tolist() == [0, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.4]))
    assert found.pred_boxes.tensor.tolist() == [[14, 14, 50, 50], [16, 16, 48, 48]]


def test_only_the_best_pairs_of_an_anchor_and_a_class_are_considered() -> None:
    maps = Maps(make_model(pre_nms_topk=2))
    maps.put((0, 0), logits_of(0.5, 0.4, 0.06, 0.04))
    maps.put((3, 4), logits_of(0.3, 0.3, 0.3, 0.1))
    found = maps.detect()
    torch.testing.assert_close(found.scores, torch.tensor([0.5, 0.4]))


def test_nothing_found() -> None:
    found = Maps(make_model()).detect()
    assert len(found) == 0
    assert found.pred_boxes.tensor.shape == (0, 4) and found.scores.shape == (0,)


# ---------------------------------------------------------------------------------------
# The whole detector, by plain arguments
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [-1, 0])
@pytest.mark.parametrize("objects", [(1, 2), (0, 2), (0, 0)])
def test_every_part_learns(objects: tuple[int, int], boundary: float) -> None:
    sizes = [(48, 64), (64, 40)]
    boxes, classes = [[4.0, 4, 30, 36], [10, 20, 38, 46]], [1, 2]
    batch = [
        {
            "image": make_picture(index, size),
            "instances": make_targets(boxes[:count], classes[:count], size),
        }
        for index, (size, count) in enumerate(zip(sizes, objects, strict=True))
    ]
    model = make_model(anchor_boundary_thresh=boundary)
    with EventStorage():
        losses = model(batch)
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert (losses["loss_box_reg"] > 0) == (sum(objects) > 0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_new_network_thinks_every_class_as_likely() -> None:
    model = make_model(batch_size_per_image=8)
    batch = [{"image": make_picture(), "instances": make_targets([[4.0, 4, 30, 36]], [1])}]
    with EventStorage():
        losses = model(batch)
    assert losses["loss_cls"].item() == pytest.approx(math.log(NUM_CLASSES + 1), abs=0.02)


def test_predicts_in_the_size_asked_for() -> None:
    model = make_model().eval()
    with torch.no_grad():
        ((plain,), (output,)) = (
            model.inference([{"image": make_picture(), "height": 128, "width": 240}], False),
            model([{"image": make_picture(), "height": 128, "width": 240}]),
        )
    found = output["instances"]
    assert plain.image_size == PICTURE_SIZE and found.image_size == (128, 240)
    assert len(found) == len(plain) > 0
    torch.testing.assert_close(
        found.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0])
    )
    torch.testing.assert_close(found.scores, plain.scores)


def test_pictures_of_different_sizes_do_not_disturb_one_another() -> None:
    model = make_model().eval()
    pictures = [{"image": make_picture(0)}, {"image": make_picture(1, (32, 48))}]
    with torch.no_grad():
        together = model(pictures)
        alone = model(pictures[:1])
    for name in ("scores", "pred_classes"):
        assert torch.equal(together[0]["instances"].get(name), alone[0]["instances"].get(name))
    boxes = together[1]["instances"].pred_boxes.tensor
    assert boxes[:, 2].max() <= 48 and boxes[:, 3].max() <= 32


def test_autocast_keeps_the_losses_in_float32() -> None:
    model = make_model()
    batch = [{"image": make_picture(), "instances": make_targets([[4.0, 4, 30, 36]], [1])}]
    torch.manual_seed(3)
    with EventStorage():
        expected = model(batch)
    torch.manual_seed(3)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.02)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (output,) = model([{"image": make_picture()}])
    assert output["instances"].scores.dtype == torch.float32 and len(output["instances"]) > 0


def test_shows_what_it_detects_in_training() -> None:
    batch = [{"image": make_picture(), "instances": make_targets([[4.0, 4, 30, 36]], [1])}]
    with EventStorage(start_iter=3) as storage:
        make_model(vis_period=2)(batch)
        assert not storage._vis_data
    with EventStorage(start_iter=4) as storage:
        losses = make_model(vis_period=2)(batch)
        assert len(storage._vis_data) == 1
    assert losses["loss_cls"].requires_grad


# ---------------------------------------------------------------------------------------
# From a config
# ---------------------------------------------------------------------------------------


@pytest.fixture
def cfg() -> CfgNode:
    """A thin ResNet-18 with batch norm, three classes and small pictures, on CPU."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "CategoryAwareRPN", "MODEL.DEVICE", "cpu"),
            *("MODEL.BACKBONE.NAME", "build_deform_resnet_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
            *("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", ["res5"]),
            *("MODEL.RESNETS.RES5_DILATION", 2),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]], "MODEL.RPN.IN_FEATURES", ["res5"]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES),
            *("MODEL.CATEGORY_AWARE_RPN.CONV_DIM", 16),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64),
            *("DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return cfg


def test_config_keys_arrive(cfg: CfgNode) -> None:
    cfg.merge_from_list(
        [
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 11, "MODEL.RPN.POSITIVE_FRACTION", 0.3),
            *("MODEL.RPN.BOUNDARY_THRESH", 7, "MODEL.RPN.SMOOTH_L1_BETA", 0.2),
            *("MODEL.RPN.LOSS_WEIGHT", 2.0, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 3.0),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 13, "VIS_PERIOD", 17),
            *("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 2.0, 3.0, 4.0)),
            *("MODEL.RPN.IOU_THRESHOLDS", [0.2, 0.6]),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.4),
            *("TEST.DETECTIONS_PER_IMAGE", 19),
        ]
    )
    model = build_model(cfg)
    assert type(model) is CategoryAwareRPN
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}
    assert (model.batch_size_per_image, model.positive_fraction) == (11, 0.3)
    assert (model.anchor_boundary_thresh, model.smooth_l1_beta) == (7, 0.2)
    assert model.loss_weight == {"loss_cls": 2.0, "loss_box_reg": 6.0}
    assert (model.pre_nms_topk, model.vis_period) == (13, 17)
    assert model.box2box_transform.weights == (1.0, 2.0, 3.0, 4.0)
    matcher = model.anchor_matcher
    assert matcher.thresholds[1:-1] == [0.2, 0.6] and matcher.allow_low_quality_matches
    selector = model.box_selector
    assert (selector.score_thresh, selector.nms_thresh, selector.topk_per_image) == (0.01, 0.4, 19)
    assert model.head.cls_logits.weight.shape == (2 * 3 * (NUM_CLASSES + 1), 16, 1, 1)
    assert model.head.bbox_pred.weight.shape == (2 * 3 * 4, 16, 1, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.MASK_ON", True], "boxes only"),
        (["MODEL.RPN.IN_FEATURES", ["res4"]], r"RPN\.IN_FEATURES is \['res4'\].*\['res5'\]"),
        (["MODEL.RPN.IN_FEATURES", []], "IN_FEATURES"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 0], "NUM_CLASSES"),
        (
            [
                *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
                *("MODEL.RPN.IN_FEATURES", ["res4", "res5"]),
            ],
            "same channels",
        ),
    ],
)
def test_wrong_settings_are_named(cfg: CfgNode, options: list, message: str) -> None:
    cfg.merge_from_list(options)
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize("num_classes, anchors", [(20, 9), (80, 12)])
def test_parameters_of_the_paper_s_network(num_classes: int, anchors: int) -> None:
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "CategoryAwareRPN"),
            *("MODEL.BACKBONE.NAME", "build_deform_resnet_backbone"),
            *("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.OUT_FEATURES", ["res5"]),
            *("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RPN.IN_FEATURES", ["res5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[128, 256, 512, 64][: anchors // 3]]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
        ]
    )
    counts = []
    for layers in (0, 3):
        cfg.MODEL.DEFORM.NUM_LAYERS = layers
        with torch.device("meta"):
            model = META_ARCH_REGISTRY.get("CategoryAwareRPN")(cfg)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    # ResNet-101's convolutions: all 44,549,160 parameters but the classifier's 2,049,000 and batch
    # norm's 105,344, which are frozen and so are buffers
    body = 44_549_160 - 2_049_000 - 105_344
    head = (2048 + 1) * 1024 + (1024 + 1) * anchors * (num_classes + 1 + 4)
    assert counts == [body + head, body + head + 3 * 82_962]


def test_new_offsets_change_nothing(cfg: CfgNode) -> None:
    cfg.MODEL.DEFORM.NUM_LAYERS = 0
    plain = build_model(cfg).eval()
    cfg.MODEL.DEFORM.NUM_LAYERS = 3
    deformable = build_model(cfg).eval()
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) == 6
    assert all("_offset." in name for name in missing)
    picture = [{"image": make_picture(size=(64, 96))}]
    with torch.no_grad():
        expected, found = (model(picture)[0]["instances"] for model in (plain, deformable))
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3
    )


def test_a_picture_with_nothing_but_a_crowd(cfg: CfgNode, tmp_path: Path) -> None:
    path = str(tmp_path / "crowd.png")
    Image.fromarray(make_picture().permute(1, 2, 0).numpy()).save(path)
    crowd = {
        "bbox": [4, 4, 30, 36],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 1,
        "iscrowd": 1,
    }
    record = {"file_name": path, "annotations": [crowd], "height": 64, "width": 80}
    with EventStorage() as storage:
        losses = build_model(cfg)([DatasetMapper(cfg, is_train=True)(record)])
    assert losses["loss_cls"].isfinite() and losses["loss_box_reg"] == 0
    assert storage.latest()["category_aware_rpn/num_pos_anchors"][0] == 0


@pytest.mark.skipif(not (DATASETS / "VOC2012").is_dir(), reason="the VOC2012 pictures are absent")
def test_learns_a_genuine_picture(cfg: CfgNode) -> None:
    torch.manual_seed(0)
    records = load_voc_instances(str(DATASETS / "VOC2012"), "train", CLASS_NAMES)
    record = next(r for r in records if len(r["annotations"]) == 2)
    cfg.merge_from_list(
        [
            *("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASS_NAMES), "INPUT.RANDOM_FLIP", "none"),
            *("INPUT.MIN_SIZE_TRAIN", (128,), "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64),
        ]
    )
    batch = [DatasetMapper(cfg, is_train=True)(record)]
    model = build_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    with EventStorage():
        for _ in range(40):
            total = sum(model(batch).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    assert totals[0] > 2.5  # log 21 is 3.04
    assert sum(totals[-5:]) / 5 < 0.1 * totals[0]
    model.eval()
    with torch.no_grad():
        found = model(batch)[0]["instances"]
    wanted = {annotation["category_id"] for annotation in record["annotations"]}
    assert int(found.pred_classes[0]) in wanted


def test_trains_evaluates_and_predicts_on_deformed_digits(cfg: CfgNode, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from d2_deform.data.deformed_digits import register_deformed_digits
    from d2_deform.engine import DeformTrainer

    name = "category_aware_rpn_digits"
    register_deformed_digits(
        name, "train", 4, cache_dir=str(tmp_path / "cache"), image_size=64, min_height=0.3
    )
    try:
        cfg.merge_from_list(
            [
                *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)),
                *("MODEL.ROI_HEADS.NUM_CLASSES", 10, "SOLVER.IMS_PER_BATCH", 2),
                *("SOLVER.MAX_ITER", 4, "OUTPUT_DIR", str(tmp_path), "VIS_PERIOD", 2),
            ]
        )
        trainer = DeformTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        assert 0 <= trainer.test(cfg, trainer.model)["bbox"]["AP50"] <= 100
        cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
        predictor = DefaultPredictor(cfg)
        picture = np.array(Image.open(DatasetCatalog.get(name)[0]["file_name"]))
        assert predictor(picture)["instances"].image_size == picture.shape[:2]
        reloaded = build_model(cfg)
        DetectionCheckpointer(reloaded).load(cfg.MODEL.WEIGHTS)
        for key, value in trainer.model.state_dict().items():
            assert torch.equal(value, reloaded.state_dict()[key]), key
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
