"""Faster R-CNN's heads: pooler, light head, StandardROIHeads' behaviour, whole detectors."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from roi_inputs import PICTURE_SIZE, make_boxes, make_images, make_proposals
from torch import Tensor, nn

from d2_deform import add_deform_config
from d2_deform.engine import OffsetMonitor
from d2_deform.modeling.new_layers import build_conv_new
from d2_deform.modeling.roi_heads import BoxOutputLayers, DeformROIHeads, DeformROIPooler
from d2_deform.solver import build_optimizer

VOC2012 = Path(os.environ.get("DETECTRON2_DATASETS", "../shared/data/datasets")) / "VOC2012"
NUM_CLASSES = 3
FPN_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
OFFSET_FC_PARAMETERS = 1_229_410  # 98 x (7 * 7 * 256 + 1), paper table 4 with its convolutions


def make_maps(strides: list[int], channels: int, pictures: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    height, width = PICTURE_SIZE
    return [
        torch.randn(pictures, channels, height // stride, width // stride, generator=generator)
        for stride in strides
    ]


def make_targets(*counts: int) -> list[Instances]:
    targets = []
    for index, count in enumerate(counts):
        boxes = make_boxes(count, seed=10 + index)
        masks = torch.zeros(count, *PICTURE_SIZE, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.tensor.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        targets.append(
            Instances(
                PICTURE_SIZE,
                gt_boxes=boxes,
                gt_classes=torch.arange(count) % NUM_CLASSES,
                gt_masks=BitMasks(masks),
            )
        )
    return targets


def make_cfg(*opts) -> CfgNode:
    """Light Faster R-CNN on res5 with three classes."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = "DeformROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "DeformRoIPool"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM = 6
    cfg.merge_from_list(list(opts))
    return cfg


FPN_OPTS = [
    "MODEL.ROI_HEADS.IN_FEATURES",
    list(FPN_STRIDES),
    "MODEL.DEFORM_ROI_HEADS.CONV_DIM",
    0,
]
MASK_OPTS = [
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 4),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
]


def make_heads(cfg: CfgNode, channels: int = 8, seed: int = 0) -> StandardROIHeads:
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    strides = {"res5": 16, **FPN_STRIDES}
    shapes = {name: ShapeSpec(channels=channels, stride=strides[name]) for name in names}
    torch.manual_seed(seed)
    return build_roi_heads(cfg, shapes)


def make_features(cfg: CfgNode, channels: int = 8) -> dict[str, Tensor]:
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    strides = {"res5": 16, **FPN_STRIDES}
    maps = make_maps([strides[name] for name in names], channels)
    return dict(zip(names, maps, strict=True))


def enlarge(module: nn.Module, std: float = 0.3) -> None:
    """Weights, offsets included, large enough to tell outputs apart."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


# ---------------------------------------------------------------------------- the pooler


@pytest.mark.parametrize("strides", [[16], list(FPN_STRIDES.values())])
def test_zero_offsets_pool_as_roi_align(strides: list[int]) -> None:
    scales = [1 / stride for stride in strides]
    boxes = [make_boxes(6, 0), Boxes(torch.tensor([[0.0, 0.0, 160.0, 128.0], [3, 4, 5, 9]]))]
    # With FPN the canonical size of 40 pixels spreads these boxes over several levels.
    deform = DeformROIPooler(7, scales, 4, 5, canonical_box_size=40)
    rigid = ROIPooler(7, scales, 4, "ROIAlignV2", canonical_box_size=40)
    maps = make_maps(strides, 5)
    torch.testing.assert_close(deform(maps, boxes), rigid(maps, boxes))
    enlarge(deform)
    assert not torch.allclose(deform(maps, boxes), rigid(maps, boxes), atol=1e-2)


def test_offsets_move_the_bins() -> None:
    """On a map that holds x, a pooled value says where its bin lies."""
    pooler = DeformROIPooler(2, [1 / 16], 4, 1, gamma=0.1)
    columns = torch.arange(20, dtype=torch.float32).expand(1, 1, 20, 20)
    box = Boxes(torch.tensor([[64.0, 64.0, 192.0, 192.0]]))  # cells 3.5 to 11.5: bins at 5.5, 9.5
    torch.testing.assert_close(
        pooler([columns], [box]), torch.tensor([5.5, 9.5]).expand(1, 1, 2, 2)
    )
    bias = dict(pooler.named_parameters())["level_poolers.0.offset_fc.bias"]
    with torch.no_grad():
        bias.view(2, 2, 2)[0, 0, 0] = 2.5  # of the upper left bin, by 0.1 * 2.5 * 8 cells
    expected = torch.tensor([[[[7.5, 9.5], [5.5, 9.5]]]])
    torch.testing.assert_close(pooler([columns], [box]), expected)


def test_each_level_has_its_own_offsets() -> None:
    pooler = DeformROIPooler(3, [1 / 8, 1 / 16], 2, 4, canonical_box_size=40, canonical_level=4)
    maps = make_maps([8, 16], 4, pictures=1)
    small = Boxes(torch.tensor([[10.0, 10.0, 35.0, 35.0]]))
    pooler(maps, [small]).square().sum().backward()
    gradients = {name: value.grad.abs().sum() for name, value in pooler.named_parameters()}
    assert gradients["level_poolers.0.offset_fc.bias"] > 0
    assert gradients["level_poolers.1.offset_fc.bias"] == 0


@pytest.mark.parametrize("strides", [[16], [8, 16]])
def test_pooler_without_boxes(strides: list[int]) -> None:
    pooler = DeformROIPooler(3, [1 / stride for stride in strides], 2, 4)
    none = Boxes(torch.zeros(0, 4))
    pooled = pooler(make_maps(strides, 4), [none, none])
    assert pooled.shape == (0, 4, 3, 3)
    pooled.sum().backward()
    assert all(not parameter.grad.any() for parameter in pooler.parameters())


def test_pooler_needs_a_sampling_ratio() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.ROI_BOX_HEAD\.POOLER_SAMPLING_RATIO"):
        DeformROIPooler(7, [1 / 16], 0, 4)


# ---------------------------------------------------------------------------- the heads


def count(cfg: CfgNode, channels: int) -> int:
    with torch.device("meta"):
        heads = make_heads(cfg, channels)
    return sum(parameter.numel() for parameter in heads.parameters())


def test_parameters_of_the_paper() -> None:
    paper = [
        *("MODEL.DEFORM_ROI_HEADS.CONV_DIM", 256, "MODEL.ROI_BOX_HEAD.FC_DIM", 1024),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, "MODEL.ROI_HEADS.NUM_CLASSES", 20),
    ]
    deform = count(make_cfg(*paper), channels=2048)
    plain = count(make_cfg(*paper, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"), channels=2048)
    assert deform - plain == OFFSET_FC_PARAMETERS
    # 1x1 to 256, 12544 to 1024, 1024 to 1024, 21 scores and 20 boxes
    assert plain == 256 * 2049 + 1024 * 12545 + 1024 * 1025 + (21 + 80) * 1025


def test_built_by_plain_arguments() -> None:
    heads = DeformROIHeads(
        conv_new=build_conv_new(8, 6),
        box_in_features=["res5"],
        box_pooler=DeformROIPooler(3, [1 / 16], 2, 6),
        box_head=FastRCNNConvFCHead(
            ShapeSpec(channels=6, height=3, width=3), conv_dims=[], fc_dims=[5]
        ),
        box_predictor=BoxOutputLayers(
            ShapeSpec(channels=5),
            box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
            num_classes=NUM_CLASSES,
            test_nms_thresh=0.3,
        ),
        num_classes=NUM_CLASSES,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1]),
    ).eval()
    assert heads.box_predictor.box_selector.nms_thresh == 0.3
    features = {"res5": make_maps([16], 8)[0]}
    scores, deltas = heads.predict(features, [make_boxes(5, 0), make_boxes(2, 1)])
    assert scores.shape == (7, NUM_CLASSES + 1) and deltas.shape == (7, 4 * NUM_CLASSES)
    found, losses = heads(make_images(), features, make_proposals(5, 2))
    assert len(found) == 2 and losses == {}


def test_state_dict_names_and_first_weights() -> None:
    heads = make_heads(make_cfg("MODEL.DEFORM_ROI_HEADS.CONV_DIM", 64), channels=64)
    state = heads.state_dict()
    layers = [
        *("conv_new", "box_pooler.level_poolers.0.offset_fc", "box_head.fc1", "box_head.fc2"),
        *("box_predictor.cls_score", "box_predictor.bbox_pred"),
    ]
    assert set(state) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert state["conv_new.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert not state["conv_new.bias"].any()
    assert not state["box_pooler.level_poolers.0.offset_fc.weight"].any()


@pytest.mark.parametrize("on_pred_boxes", [False, True])
@pytest.mark.parametrize("maps", [[], FPN_OPTS], ids=["res5", "fpn"])
def test_without_its_own_parts_it_is_standard_roi_heads(maps: list, on_pred_boxes: bool) -> None:
    opts = [
        *MASK_OPTS,
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "MODEL.DEFORM_ROI_HEADS.CONV_DIM", 0),
        *("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", on_pred_boxes),
        *maps,
    ]
    ours = make_heads(make_cfg(*opts))
    theirs = make_heads(make_cfg(*opts, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
    assert type(ours) is DeformROIHeads and type(theirs) is StandardROIHeads
    enlarge(ours)
    theirs.load_state_dict(ours.state_dict())
    features = make_features(make_cfg(*opts))
    results = []
    for heads in (ours, theirs):
        torch.manual_seed(3)
        with EventStorage():
            _, losses = heads(make_images(), features, make_proposals(30, 20), make_targets(2, 1))
        (first, second), _ = heads.eval()(make_images(), features, make_proposals(30, 20))
        results.append((losses, first.get_fields(), second.get_fields()))
    for mine, expected in zip(*results, strict=True):
        assert mine.keys() == expected.keys()
        for key, value in mine.items():
            tensors = [getattr(x, "tensor", x) for x in (value, expected[key])]
            torch.testing.assert_close(*tensors, msg=key)
    assert len(results[0][1]["scores"]) > 0


def test_config_reaches_the_parts() -> None:
    heads = make_heads(
        make_cfg(
            *("MODEL.DEFORM_ROI_HEADS.GAMMA", 0.3, "MODEL.DEFORM_ROI_HEADS.ALIGNED", False),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001),
            *("TEST.DETECTIONS_PER_IMAGE", 300, "TEST.SOFT_NMS.ENABLED", True),
            *("MODEL.OHEM.ENABLED", True, "MODEL.OHEM.BATCH_SIZE_PER_IMAGE", 64),
        )
    )
    (pool,) = heads.box_pooler.level_poolers
    assert pool.output_size == (3, 3) and pool.spatial_scale == 1 / 16
    assert (pool.sampling_ratio, pool.gamma, pool.aligned) == (2, 0.3, False)
    selector = heads.box_predictor.box_selector
    assert (selector.score_thresh, selector.nms_thresh, selector.topk_per_image) == (
        0.001,
        0.3,
        300,
    )
    assert selector.soft_nms is not None and selector.box_voting is None
    assert heads.ohem.batch_size_per_image == 64


def test_rigid_pooling_types_build() -> None:
    for name in ("ROIPool", "ROIAlignV2", "ROIAlign"):
        cfg = make_cfg("MODEL.ROI_BOX_HEAD.POOLER_TYPE", name)
        heads = make_heads(cfg)
        scores, _ = heads.predict(make_features(cfg), [make_boxes(3, 0), make_boxes(1, 1)])
        assert scores.shape == (4, NUM_CLASSES + 1)


@pytest.mark.parametrize("opts", [[], FPN_OPTS], ids=["res5", "fpn"])
@pytest.mark.parametrize("targets", [(0, 0), (2, 0)])
@pytest.mark.parametrize("proposals", [(0, 0), (0, 3)])
def test_training_without_proposals_or_targets(
    opts: list, proposals: tuple[int, int], targets: tuple[int, int]
) -> None:
    cfg = make_cfg(*opts)
    heads = make_heads(cfg)
    enlarge(heads)
    with EventStorage():
        _, losses = heads(
            make_images(), make_features(cfg), make_proposals(*proposals), make_targets(*targets)
        )
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    found, _ = heads.eval()(make_images(), make_features(cfg), make_proposals(*proposals))
    assert len(found) == 2 and len(found[0]) == 0


def test_background_below_the_lower_bound_is_not_learnt_from() -> None:
    """Faster R-CNN on VOC: foreground from IoU 0.5, background in [0.1, 0.5)."""
    cfg = make_cfg(
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.1, 0.5], "MODEL.ROI_HEADS.IOU_LABELS", [-1, 0, 1]),
        *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    )
    heads = make_heads(cfg)
    target = Instances(
        PICTURE_SIZE,
        gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 100.0, 10.0]])),
        gt_classes=torch.tensor([1]),
    )
    # IoU 0.05, 0.09, 0.2, 0.49, 0.5 and 0.9 with the only object
    widths = torch.tensor([5.0, 9.0, 20.0, 49.0, 50.0, 90.0])
    boxes = torch.zeros(6, 4)
    boxes[:, 2], boxes[:, 3] = widths, 10.0
    proposals = Instances(
        PICTURE_SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.ones(6)
    )
    with EventStorage():
        (sampled,) = heads.label_and_sample_proposals([proposals], [target])
    labels = dict(
        zip(sampled.proposal_boxes.tensor[:, 2].tolist(), sampled.gt_classes.tolist(), strict=True)
    )
    assert labels == {20.0: NUM_CLASSES, 49.0: NUM_CLASSES, 50.0: 1, 90.0: 1}


@pytest.mark.parametrize("opts", [[], FPN_OPTS], ids=["res5", "fpn"])
def test_autocast(opts: list) -> None:
    cfg = make_cfg(*opts)
    heads = make_heads(cfg)
    enlarge(heads)
    features = {name: x.bfloat16() for name, x in make_features(cfg).items()}
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        _, losses = heads(make_images(), features, make_proposals(9, 9), make_targets(2, 1))
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = heads.eval()(make_images(), features, make_proposals(9, 9))
    assert len(found[0]) > 0


def test_solver_and_monitor_find_the_offset_layers() -> None:
    cfg = make_cfg(*FPN_OPTS, "SOLVER.ROI_OFFSET_LR_FACTOR", 0.01, "SOLVER.BASE_LR", 1.0)
    heads = make_heads(cfg)
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    slow = {
        names[id(parameter)]
        for group in build_optimizer(cfg, heads).param_groups
        if group["lr"] == 0.01
        for parameter in group["params"]
    }
    layers = [f"box_pooler.level_poolers.{level}.offset_fc" for level in range(4)]
    assert slow == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}

    class Trainer:
        model, iter, storage = heads, 0, EventStorage()

    monitor = OffsetMonitor(period=1)
    monitor.trainer = Trainer
    monitor.before_train()
    monitor.before_step()
    heads.eval()(make_images(), make_features(cfg), make_proposals(9, 9))
    monitor.after_step()
    # The boxes are small: all of them lie on p2.
    assert "offset/box_pooler.level_poolers.0.offset_fc/mean" in Trainer.storage.histories()


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0], "POOLER_SAMPLING_RATIO"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign"], "POOLER_TYPE is 'RoIAlign'.*ROIAlignV2"),
        ([*FPN_OPTS, "MODEL.DEFORM_ROI_HEADS.CONV_DIM", 256], "CONV_DIM.*set it to 0"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["res3"]], "OUT_FEATURES"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["res4", "res5"]], r"\[8, 16\] channels"),
    ],
)
def test_wrong_settings_are_named(options: list, message: str) -> None:
    shapes = {name: ShapeSpec(channels=16, stride=16) for name in ("res5", *FPN_STRIDES)}
    shapes["res4"] = ShapeSpec(channels=8, stride=16)
    with pytest.raises(ValueError, match=message):
        DeformROIHeads(make_cfg(*options), shapes)


# ---------------------------------------------------------------------------- whole detectors


def read_example() -> dict:
    """A VOC picture, every third pixel of it, with its boxes and masks of their shape."""
    path = VOC2012 / "Annotations" / "2007_000027.xml"
    if not path.exists():
        pytest.skip("needs VOC2012 under DETECTRON2_DATASETS")
    picture = read_image(path.parents[1] / "JPEGImages" / "2007_000027.jpg", "BGR")
    step = 3
    image = torch.from_numpy(picture[::step, ::step].copy()).permute(2, 0, 1)
    boxes = []
    for node in ElementTree.parse(path).iter("object"):
        corners = node.find("bndbox")
        assert corners is not None
        boxes.append(
            [float(corners.findtext(k, "")) / step for k in ("xmin", "ymin", "xmax", "ymax")]
        )
    targets = Instances(
        tuple(image.shape[1:]),
        gt_boxes=Boxes(torch.tensor(boxes)),
        gt_classes=torch.zeros(len(boxes), dtype=torch.int64),
    )
    masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, targets.gt_boxes.tensor.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    targets.gt_masks = BitMasks(masks)
    return {"image": image, "instances": targets, "height": 500, "width": 486}


THIN_OPTS = [
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 60, "MODEL.RPN.POST_NMS_TOPK_TEST", 30),
]
RES5_MODEL = [
    *("MODEL.BACKBONE.NAME", "build_deform_resnet_backbone", "MODEL.RESNETS.RES5_DILATION", 2),
    *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.RPN.IN_FEATURES", ["res4"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128]]),
]
FPN_MODEL = [
    *FPN_OPTS,
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
]


@pytest.mark.parametrize(
    "opts",
    [
        RES5_MODEL,
        FPN_MODEL,
        [*FPN_MODEL, *MASK_OPTS],
        [*FPN_MODEL, *MASK_OPTS, "MODEL.OHEM.ENABLED", True],
    ],
    ids=["faster_res5", "faster_fpn", "mask_fpn", "mask_fpn_ohem"],
)
def test_detector_learns_and_predicts_on_a_picture(opts: list) -> None:
    cfg = make_cfg(*THIN_OPTS, *opts)
    example = read_example()
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model.roi_heads, DeformROIHeads)
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model([example])
        expected = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert losses.keys() == expected | ({"loss_mask"} if cfg.MODEL.MASK_ON else set())
        sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    before = model.roi_heads.box_pooler.level_poolers[0].offset_fc.bias.clone()
    optimizer.step()
    assert not torch.equal(model.roi_heads.box_pooler.level_poolers[0].offset_fc.bias, before)
    model.eval()
    with torch.no_grad():
        (output,) = model([example])
    found = output["instances"]
    assert found.image_size == (500, 486) and len(found) > 0
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
