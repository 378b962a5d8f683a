"""Several scales and mirrored pictures: merged by hand, and with tiny networks of every kind."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2_deform.config import add_deform_config
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.test_time_augmentation import (
    CategoryAwareRPNWithTTA,
    RCNNWithTTA,
    SemanticSegmentorWithTTA,
    build_tta_model,
)

DATASETS = Path(
    os.environ.get(
        "DETECTRON2_DATASETS",
        os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data", "datasets"),
    )
)
PICTURES = DATASETS / "VOC2012" / "JPEGImages"
NUM_CLASSES = 3
SIZE = (96, 128)  # height, width


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make_cfg(meta_architecture: str, *options: Any) -> CfgNode:
    """A thin ResNet-18, three classes, one scale without flip, on CPU."""
    cfg = get_cfg()
    add_deform_config(cfg)
    rcnn = ("res4", "res5") if meta_architecture == "RFCN" else ("res5", "res5")
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", meta_architecture, "MODEL.DEVICE", "cpu"),
            *("MODEL.BACKBONE.NAME", "build_deform_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.RESNETS.RES5_DILATION", 2),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]], "MODEL.RPN.CONV_DIMS", [16]),
            *("MODEL.RPN.IN_FEATURES", [rcnn[0]], "MODEL.ROI_HEADS.IN_FEATURES", [rcnn[1]]),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 30, "MODEL.ROI_HEADS.NAME", "RFCNROIHeads"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES, "MODEL.RFCN.CONV_DIM", 16),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3, "MODEL.CATEGORY_AWARE_RPN.CONV_DIM", 16),
            *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabHead"),
            *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", NUM_CLASSES),
            *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16),
            *("TEST.AUG.MIN_SIZES", (SIZE[0],), "TEST.AUG.FLIP", False),
            *options,
        ]
    )
    return cfg


def make_model(cfg: CfgNode) -> nn.Module:
    """A network whose random scores and boxes differ from place to place."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, module in model.named_modules():
        if name.endswith(("cls_score", "cls_logits", "sem_seg_head.score")):
            module.weight.mul_(30)
        elif name.endswith("bbox_pred"):
            module.weight.mul_(10)
    return model


def make_picture(size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 3, 6, 8, generator=generator) * 255
    return nn.functional.interpolate(blocks, size=size, mode="bilinear")[0].to(torch.uint8)


def as_input(picture: Tensor) -> dict[str, Any]:
    return {"image": picture, "height": picture.shape[1], "width": picture.shape[2]}


def assert_same(one: Instances, other: Instances, **tolerance: float) -> None:
    assert len(one) == len(other) > 0 and one.image_size == other.image_size
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(one.scores, other.scores, **tolerance)
    assert torch.equal(one.pred_classes, other.pred_classes)


# ---------------------------------------------------------------------------------------
# The union of the scales, by hand
# ---------------------------------------------------------------------------------------


class Scripted(GeneralizedRCNN):
    """Finds given boxes, in the pixels of the picture, for each height that it is shown."""

    def __init__(self, box_selector: BoxSelector, script: dict[int, list]) -> None:
        nn.Module.__init__(self)
        self.roi_heads = nn.Module()
        self.roi_heads.box_selector = box_selector
        self.script = script

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        assert len(batched_inputs) == 1 and detected_instances is None and not do_postprocess
        height, width = batched_inputs[0]["image"].shape[1:]
        boxes, scores = zip(*self.script[height], strict=True)
        scores = torch.tensor(scores)
        return self.roi_heads.box_selector(
            [torch.tensor(boxes)],
            [torch.cat([scores, scores[:, :1] * 0], dim=1)],
            [(height, width)],
        )[0]


def scripted_cfg(*options: Any) -> CfgNode:
    return make_cfg(
        "RFCN",
        *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3),
        *("TEST.AUG.MIN_SIZES", (20, 40), "TEST.AUG.FLIP", False),
        *options,
    )


# In the picture, 20 x 30: (0, 0, 10, 10) and, overlapping it by .8, (0, 0, 10, 8) and (0, 0, 8, 10)
SCRIPT = {
    20: [((0.0, 0, 10, 10), (0.8, 0.01)), ((0.0, 0, 10, 8), (0.4, 0.3))],
    40: [((0.0, 0, 16, 20), (0.6, 0.01)), ((40.0, 20, 70, 40), (0.5, 0.01))],
}


def test_union_of_the_scales_by_hand() -> None:
    cfg = scripted_cfg()
    model = RCNNWithTTA(cfg, Scripted(BoxSelector(cfg), SCRIPT))
    (output,) = model([as_input(make_picture((20, 30)))])
    found = output["instances"]
    assert found.image_size == (20, 30)
    # The last box is clipped at a width of 60 in its scale.
    expected = [[0.0, 0, 10, 10], [20.0, 10, 30, 20], [0.0, 0, 10, 8]]
    assert found.pred_boxes.tensor.tolist() == expected
    assert found.scores.tolist() == pytest.approx([0.8, 0.5, 0.3])
    assert found.pred_classes.tolist() == [0, 0, 1]


def test_boxes_of_all_scales_vote_once() -> None:
    cfg = scripted_cfg("TEST.BOX_VOTING.ENABLED", True)
    model = RCNNWithTTA(cfg, Scripted(BoxSelector(cfg), SCRIPT))
    (output,) = model([as_input(make_picture((20, 30)))])
    boxes = output["instances"].pred_boxes.tensor
    # x2: .8 * 10 + .4 * 10 + .6 * 8; y2: .8 * 10 + .4 * 8 + .6 * 10; both over 1.8. With NMS at
    # the scales, (0, 0, 10, 8) would have had no vote; of its own class there is nothing else.
    expected = [[0, 0, 16.8 / 1.8, 17.2 / 1.8], [20, 10, 30, 20], [0, 0, 10, 8]]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_soft_nms_once_over_the_scales() -> None:
    cfg = scripted_cfg("TEST.SOFT_NMS.ENABLED", True, "TEST.SOFT_NMS.SIGMA", 0.5)
    model = RCNNWithTTA(cfg, Scripted(BoxSelector(cfg), SCRIPT))
    (output,) = model([as_input(make_picture((20, 30)))])
    found = output["instances"]
    # Of class 0 after .8: .6 * e^(-.8^2 / .5) = .167; .4 * e^(-1.28) = .111, and then that times
    # e^(-(64 / 96)^2 / .5), the overlap of the two, = .046: below the threshold of .05.
    assert found.scores.tolist() == pytest.approx([0.8, 0.5, 0.3, 0.6 * math.exp(-1.28)])
    assert found.pred_classes.tolist() == [0, 0, 1, 0]


def test_the_model_chooses_as_before_afterwards() -> None:
    cfg = scripted_cfg()
    scripted = Scripted(BoxSelector(cfg), {20: SCRIPT[20]})
    selector = scripted.roi_heads.box_selector
    with pytest.raises(KeyError):  # it knows nothing of height 40
        RCNNWithTTA(cfg, scripted)([as_input(make_picture((20, 30)))])
    assert scripted.roi_heads.box_selector is selector


def test_best_of_the_union_are_kept() -> None:
    cfg = scripted_cfg("TEST.DETECTIONS_PER_IMAGE", 2)
    model = RCNNWithTTA(cfg, Scripted(BoxSelector(cfg), SCRIPT))
    (output,) = model([as_input(make_picture((20, 30)))])
    assert output["instances"].scores.tolist() == pytest.approx([0.8, 0.5])


# ---------------------------------------------------------------------------------------
# Detectors
# ---------------------------------------------------------------------------------------

DETECTORS = {"RFCN": RCNNWithTTA, "CategoryAwareRPN": CategoryAwareRPNWithTTA}
SOFT = ("TEST.SOFT_NMS.ENABLED", True)
VOTING = ("TEST.BOX_VOTING.ENABLED", True, "TEST.BOX_VOTING.NUM_ROUNDS", 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RFCN", ()),
        ("RFCN", SOFT),
        ("RFCN", (*SOFT, *VOTING)),
        ("CategoryAwareRPN", ()),
        ("CategoryAwareRPN", SOFT),
    ],
)
def test_one_scale_is_plain_inference(name: str, options: tuple) -> None:
    cfg = make_cfg(name, *options)
    model = make_model(cfg)
    tta_model = build_tta_model(cfg, model)
    assert type(tta_model) is DETECTORS[name]
    given = as_input(make_picture())
    (plain,), (augmented,) = model([given]), tta_model([given])
    assert_same(augmented["instances"], plain["instances"], rtol=0, atol=0)
    (again,) = model([given])
    assert_same(again["instances"], plain["instances"], rtol=0, atol=0)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_mirrored_picture_has_mirrored_boxes(name: str) -> None:
    cfg = make_cfg(name, "TEST.AUG.FLIP", True)
    tta_model = build_tta_model(cfg, make_model(cfg))
    picture = make_picture()
    (one,) = tta_model([as_input(picture)])
    (other,) = tta_model([as_input(picture.flip(dims=[2]))])
    boxes = other["instances"].pred_boxes.tensor
    mirrored = other["instances"]
    mirrored.pred_boxes = Boxes(
        torch.stack([SIZE[1] - boxes[:, 2], boxes[:, 1], SIZE[1] - boxes[:, 0], boxes[:, 3]], dim=1)
    )
    assert_same(one["instances"], mirrored, rtol=0, atol=1e-4)
    # and they are not those of the picture alone
    cfg.TEST.AUG.FLIP = False
    (alone,) = build_tta_model(cfg, tta_model.model)([as_input(picture)])
    assert not torch.equal(alone["instances"].scores, one["instances"].scores)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("options", [(), (*SOFT, "TEST.BOX_VOTING.ENABLED", True)])
def test_nothing_found(name: str, options: tuple) -> None:
    cfg = make_cfg(name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, "TEST.AUG.FLIP", True, *options)
    (output,) = build_tta_model(cfg, make_model(cfg))([as_input(make_picture())])
    found = output["instances"]
    assert len(found) == 0 and found.image_size == SIZE
    assert found.pred_boxes.tensor.shape == (0, 4) and found.has("pred_classes")


@pytest.mark.parametrize("name", DETECTORS)
def test_pictures_in_one_run_change_nothing(name: str) -> None:
    """Padding aside, which the sizes here do not need."""
    cfg = make_cfg(name, "TEST.AUG.FLIP", True)
    model = make_model(cfg)
    (one,) = DETECTORS[name](cfg, model)([as_input(make_picture())])
    (other,) = DETECTORS[name](cfg, model, batch_size=3)([as_input(make_picture())])
    assert_same(one["instances"], other["instances"], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not PICTURES.is_dir(), reason="the VOC2012 pictures are absent")
def test_a_genuine_picture() -> None:
    """The paper's six scales in small, read from the file, with soft-NMS and the vote."""
    cfg = make_cfg("RFCN", *SOFT, *VOTING)
    path = sorted(PICTURES.iterdir())[0]
    picture = detection_utils.read_image(path, "BGR")
    height, width = picture.shape[:2]
    model = make_model(cfg)

    # One scale: what the network says of the resized picture, but for the place where suppression
    # and voting count overlaps: here in the picture, there in the network's input.
    cfg.TEST.AUG.MIN_SIZES = (96,)
    resized = ResizeShortestEdge(96, 10**4).get_transform(picture).apply_image(picture)
    resized = torch.from_numpy(resized.transpose(2, 0, 1).copy())
    (plain,) = model([{"image": resized, "height": height, "width": width}])
    (single,) = build_tta_model(cfg, model)([{"file_name": str(path)}])
    assert_same(single["instances"], plain["instances"], rtol=1e-3, atol=0.05)

    cfg.TEST.AUG.MIN_SIZES = (48, 58, 69, 86, 120, 140)
    cfg.TEST.AUG.FLIP = True
    (output,) = build_tta_model(cfg, model)([{"file_name": str(path)}])
    found = output["instances"]
    assert found.image_size == (height, width) and len(found) == 100
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
    assert (found.scores.diff() <= 0).all() and found.scores[0] >= single["instances"].scores[0]


@pytest.fixture
def mask_rcnn() -> tuple[CfgNode, GeneralizedRCNN]:
    """Detectron2's own Mask R-CNN with FPN, thin."""
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    add_deform_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            # frozen batch norms without statistics: this keeps the features near 1
            *("MODEL.PIXEL_STD", [3000.0, 3000.0, 3000.0]),
            *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 40, "TEST.DETECTIONS_PER_IMAGE", 10),
            *("TEST.AUG.MIN_SIZES", (SIZE[0],), "TEST.AUG.FLIP", False),
        ]
    )
    return cfg, make_model(cfg)


def test_mask_rcnn_of_detectron2(mask_rcnn) -> None:
    cfg, model = mask_rcnn
    given = as_input(make_picture())
    (plain,), (augmented,) = model([given]), build_tta_model(cfg, model)([given])
    assert_same(augmented["instances"], plain["instances"], rtol=0, atol=0)
    assert torch.equal(augmented["instances"].pred_masks, plain["instances"].pred_masks)
    predictor = model.roi_heads.box_predictor
    assert (predictor.test_nms_thresh, predictor.test_topk_per_image) == (0.5, 10)


def test_fast_rcnn_outputs_give_all_their_boxes(mask_rcnn) -> None:
    cfg, model = mask_rcnn
    tta_model = build_tta_model(cfg, model)
    given = [as_input(make_picture())]
    with tta_model._without_suppression():
        (unlimited,) = model.inference(given, do_postprocess=False)
    (usual,) = model.inference(given, do_postprocess=False)
    assert len(usual) == 10 and len(unlimited) > 40  # some proposals have a score in two classes
    assert unlimited.scores[0] == usual.scores[0] and unlimited.scores.min() > 0.05


# ---------------------------------------------------------------------------------------
# Semantic segmentation
# ---------------------------------------------------------------------------------------


class Brightness(SemanticSegmentor):
    """Logits of two classes: 0, and the picture's own values / 100, in the size asked for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.heights: list[int] = []

    def forward(self, batched_inputs):
        (given,) = batched_inputs
        image = given["image"].float()
        self.heights.append(image.shape[1])
        size = (given["height"], given["width"])
        values = nn.functional.interpolate(image[None, :1], size=size)[0] / image.shape[1]
        return [{"sem_seg": torch.cat([torch.zeros_like(values), values])}]


def test_segmentation_is_the_mean_of_probabilities_by_hand() -> None:
    picture = torch.full((3, 4, 6), 8, dtype=torch.uint8)
    cfg = make_cfg("SemanticSegmentor", "TEST.AUG.MIN_SIZES", (4, 8))
    model = Brightness()
    tta_model = SemanticSegmentorWithTTA(cfg, model)
    (output,) = tta_model([{"image": picture, "height": 2, "width": 3}])
    # Logits 8 / 4 and 8 / 8
    expected = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2
    assert model.heights == [4, 8]
    assert output["sem_seg"].shape == (2, 2, 3)
    torch.testing.assert_close(output["sem_seg"][1], torch.full((2, 3), expected))
    torch.testing.assert_close(output["sem_seg"].sum(dim=0), torch.ones(2, 3))


def test_segmentation_is_mirrored_back() -> None:
    """A network that sees single pixels says the same of both pictures."""
    picture = torch.arange(72, dtype=torch.uint8).reshape(3, 4, 6)
    cfg = make_cfg("SemanticSegmentor", "TEST.AUG.MIN_SIZES", (4,), "TEST.AUG.FLIP", True)
    model = Brightness()
    (output,) = build_tta_model(cfg, model)([{"image": picture}])
    assert model.heights == [4, 4]
    expected = torch.sigmoid(picture[0].float() / 4)
    torch.testing.assert_close(output["sem_seg"][1], expected)


def test_deeplab() -> None:
    cfg = make_cfg("SemanticSegmentor")
    model = make_model(cfg)
    picture = make_picture()
    given = {"image": picture, "height": 70, "width": 90}
    (plain,) = model([given])
    tta_model = build_tta_model(cfg, model)
    assert type(tta_model) is SemanticSegmentorWithTTA
    (single,) = tta_model([given])
    assert torch.equal(single["sem_seg"], plain["sem_seg"].softmax(dim=0))

    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (64, 96), True
    tta_model = build_tta_model(cfg, model)
    one, other = tta_model([given, {**given, "image": picture.flip(dims=[2])}])
    assert one["sem_seg"].shape == (NUM_CLASSES, 70, 90)
    torch.testing.assert_close(other["sem_seg"].flip(dims=[2]), one["sem_seg"], atol=0.02, rtol=0)
    assert (one["sem_seg"] - single["sem_seg"]).abs().max() > 0.02


# ---------------------------------------------------------------------------------------
# What has none
# ---------------------------------------------------------------------------------------


def test_models_without_it_are_named() -> None:
    cfg = make_cfg("RFCN")
    with pytest.raises(ValueError, match="no test-time augmentation for Linear"):
        build_tta_model(cfg, nn.Linear(1, 1))
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        cfg = make_cfg("RFCN", f"MODEL.{key}", True)
        with pytest.raises(ValueError, match=f"MODEL.{key}"):
            build_tta_model(cfg, nn.Linear(1, 1))
