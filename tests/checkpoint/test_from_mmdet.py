"""MMDetection's checkpoints: names and shapes of configs/dcn, and equal outputs."""

import mmdet_network
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from mmdet_network import MMDet, fill
from test_from_release import assert_close, config

from d2_deform.checkpoint import convert
from d2_deform.engine import ConfigError

STRIDE = ("MODEL.RESNETS.STRIDE_IN_1X1", False)
DPOOL = [
    *STRIDE,
    *("MODEL.DEFORM.NUM_LAYERS", 0),
    *("MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS", [1024, 1024]),
    *("MODEL.DEFORM_ROI_HEADS.ALIGNED", False),
]
BOXES = "COCO-Detection/faster_rcnn_R_"
MASKS = "COCO-InstanceSegmentation/mask_rcnn_R_"
THIN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.FPN.OUT_CHANNELS", 6),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 12),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 5),
]
THIN_SHAPES = {"width": 4, "fpn": 6, "fc": 12, "classes": 5}
ROIS = torch.tensor([[0, 3.4, 7.5, 60.2, 50.9], [0, 0, 0, 450, 380], [0, 60, 20, 260, 210]])


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "name, opts, numbers",
    [
        (f"{BOXES}50_FPN_dconv13.yaml", STRIDE, {"dcn": 2}),
        (f"{BOXES}101_FPN_dconv30.yaml", STRIDE, {"dcn": 2, "depth": 101}),
        (f"{BOXES}50_FPN_mdconv13.yaml", STRIDE, {"dcn": 3}),
        (
            f"{BOXES}50_FPN_mdconv13.yaml",
            (*STRIDE, "MODEL.DEFORM.NUM_GROUPS", 4),
            {"dcn": 3, "groups": 4},
        ),
        (f"{BOXES}50_FPN_dconv13_dpool.yaml", DPOOL, {"dpool": True}),
        (f"{BOXES}50_FPN.yaml", STRIDE, {}),
        (f"{MASKS}50_FPN_dconv13.yaml", STRIDE, {"dcn": 2, "mask": True}),
        (f"{MASKS}50_FPN_mdconv13.yaml", STRIDE, {"dcn": 3, "mask": True}),
    ],
)
def test_every_tensor_of_its_models_finds_its_place(name, opts, numbers):
    table = mmdet_network.shapes(**numbers)
    source = {key: torch.zeros(shape) for key, shape in table.items()}
    account = convert(source, "mmdet", config(name, *opts))
    assert account.complete and not account.new, account.lines()
    counters = [key for key in table if key.endswith("num_batches_tracked")]
    assert account.counters == len(counters) and not account.left_out
    assert f"left out: {len(counters)} names that end in .num_batches_tracked" in account.lines()[1]
    assert len(account.weights) + len(counters) == len(table)


@pytest.mark.parametrize(
    "name, opts, numbers",
    [
        (f"{BOXES}50_FPN_dconv13.yaml", STRIDE, {"dcn": 2}),
        (
            f"{BOXES}50_FPN_mdconv13.yaml",
            (*STRIDE, "MODEL.DEFORM.NUM_GROUPS", 2),
            {"dcn": 3, "groups": 2},
        ),
        (f"{BOXES}50_FPN_dconv13_dpool.yaml", DPOOL, {"dpool": True}),
    ],
)
def test_computes_the_same(name, opts, numbers, picture):
    weights = fill(mmdet_network.shapes(**THIN_SHAPES, **numbers))
    cfg = config(name, *opts, *THIN)
    account = convert(weights, "mmdet", cfg)
    assert account.complete, account.lines()
    model = build_model(cfg).eval()
    model.load_state_dict(account.weights)
    theirs = MMDet(weights, groups=numbers.get("groups", 1))
    image = torch.as_tensor(picture.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        features = model.backbone((image - model.pixel_mean) / model.pixel_std)
        outs = theirs.neck(theirs.data(picture))
        for ours, expected in zip(features.values(), outs, strict=True):
            assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        check_proposals(model, list(features.values()), theirs, outs)
        logits, deltas = model.roi_heads.predict(features, [Boxes(ROIS[:, 1:])])
        probabilities, boxes = theirs.heads(outs, ROIS)
    assert_close(logits.softmax(1), probabilities, rtol=1e-4, atol=1e-5)
    decoded = model.roi_heads.box_predictor.box2box_transform.apply_deltas(deltas, ROIS[:, 1:])
    assert_close(decoded, boxes, rtol=1e-4, atol=1e-3)


def check_proposals(model, maps, theirs, outs):
    rpn = model.proposal_generator
    logits, deltas = rpn.rpn_head(maps)
    deltas = [
        one.view(1, 3, 4, *one.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for one in deltas
    ]
    boxes = rpn._decode_proposals(rpn.anchor_generator(maps), deltas)
    for level, out in enumerate(outs):
        expected, scores = theirs.proposals(level, out)
        assert_close(boxes[level][0], expected, rtol=1e-4, atol=1e-3)
        ours = logits[level][0].permute(1, 2, 0).flatten().sigmoid()
        assert_close(ours, scores, rtol=1e-4, atol=1e-5)


def test_names_before_mmcvs_second_version_are_known():
    table = mmdet_network.shapes(**THIN_SHAPES, dcn=3)
    old = {key.replace("conv2.conv_offset", "conv2_offset"): table[key] for key in table}
    source = {key: torch.zeros(shape) for key, shape in old.items()}
    cfg = config(f"{BOXES}50_FPN_mdconv13.yaml", *STRIDE, *THIN)
    assert convert(source, "mmdet", cfg).complete


def test_what_it_does_not_convert_is_listed():
    """Modulated pooling, and version 1, whose background is first."""
    table = mmdet_network.shapes(**THIN_SHAPES)
    source = {key.replace("roi_head.", ""): torch.zeros(shape) for key, shape in table.items()}
    extra = "roi_head.bbox_roi_extractor.roi_layers.0.mask_fc.0.weight"
    source[extra] = torch.zeros(1)
    account = convert(source, "mmdet", config(f"{BOXES}50_FPN.yaml", *STRIDE, *THIN))
    old = [key for key in source if key.startswith("bbox_head.")]
    assert sorted(account.unknown) == sorted([*old, extra])
    assert len(account.missing) == len(old) == 8


def test_config_that_would_compute_something_else_is_refused():
    source = {key: torch.zeros(1) for key in mmdet_network.shapes(**THIN_SHAPES, dpool=True)}
    with pytest.raises(ConfigError) as refusal:
        convert(source, "mmdet", config(f"{BOXES}50_FPN_dconv13_dpool.yaml"))
    assert str(refusal.value).endswith(
        'are used: MODEL.RESNETS.STRIDE_IN_1X1 "False" '
        'MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS "[1024, 1024]" '
        'MODEL.DEFORM_ROI_HEADS.ALIGNED "False"'
    )
