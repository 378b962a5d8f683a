"""The official release's files: names and shapes of all its networks, and equal outputs."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from release_network import Release, fill, shapes
from test_mxnet_file import pack as write_mxnet

from d2_deform import model_zoo
from d2_deform.checkpoint import convert, pack, read_source_file
from d2_deform.engine import ConfigError
from d2_deform.engine.weights import load_weights

THIN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.RPN.CONV_DIMS", [12]),
    *("MODEL.RFCN.CONV_DIM", 10),
    *("MODEL.DEFORM_ROI_HEADS.CONV_DIM", 10),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 14),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 10),
]
THIN_SHAPES = {"stem": 8, "narrow": 8, "res2": 16, "rpn": 12, "conv_new": 10, "fc": 14}
RFCN = "VOC-Detection/rfcn_R_101_dconv3_dpool_release.yaml"
ROIS = torch.tensor(  # last pixel inclusive; halves, a box at the border, one outside, a tiny one
    [
        [0, 3.4, 7.5, 60.2, 50.9],
        [0, 0, 0, 111, 95],
        [0, 70.5, 20, 130, 110],
        [0, 30, 30, 30, 30],
        [0, -20, 40, 25.6, 64.5],
    ],
    dtype=torch.float64,
)


def assert_close(given, expected, **tolerance):
    torch.testing.assert_close(given, expected, check_dtype=False, **tolerance)


def config(name, *opts):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (96, 112, 3), dtype=np.uint8)


def load(arrays, cfg):
    account = convert(arrays, "release", cfg)
    assert account.complete and not account.new, account.lines()
    model = build_model(cfg).eval()
    model.load_state_dict(account.weights)
    return model.double()


def run(model, picture):
    """The maps of a BGR picture, uint8 (H, W, 3)."""
    image = torch.as_tensor(picture.transpose(2, 0, 1).astype(np.float64))[None]
    return model.backbone((image - model.pixel_mean) / model.pixel_std)


@pytest.mark.parametrize(
    "name, kind, numbers",
    [
        (RFCN, "rfcn", {"classes": 21, "groups": 4}),
        ("VOC-Detection/rfcn_R_101_release.yaml", "rfcn", {"classes": 21}),
        (
            "COCO-Detection/rfcn_R_101_dconv3_dpool_release.yaml",
            "rfcn",
            {"classes": 81, "anchors": 12, "groups": 4},
        ),
        (
            "COCO-Detection/faster_rcnn_R_101_dconv3_dpool_release.yaml",
            "rcnn",
            {"classes": 81, "anchors": 12, "groups": 4},
        ),
        ("VOC-Detection/faster_rcnn_R_101_release.yaml", "rcnn", {"classes": 21}),
        ("VOC-Segmentation/deeplab_R_101_release.yaml", "deeplab", {"classes": 21}),
        (
            "Cityscapes/deeplab_R_101_dconv3_release.yaml",
            "deeplab",
            {"classes": 19, "groups": 1},
        ),
    ],
)
def test_every_array_of_the_releases_networks_finds_its_place(name, kind, numbers):
    arrays = {key: torch.zeros(shape) for key, shape in shapes(kind, **numbers).items()}
    if kind == "deeplab":
        arrays |= fill({"arg:upsampling_weight": arrays["arg:upsampling_weight"].shape})
    account = convert(arrays, "release", config(name))
    assert account.complete and not account.new, account.lines()
    used_twice = {"deeplab": ["upsampling_weight"]}.get(kind, ["weight", "bias"])
    assert len(account.left_out) == len(used_twice)
    assert len(account.weights) + len(account.left_out) == len(arrays)


@pytest.mark.parametrize("groups", [1, 4])
def test_rfcn_computes_the_same(groups, picture):
    arrays = fill(shapes("rfcn", classes=6, groups=groups, **THIN_SHAPES))
    cfg = config(RFCN, *THIN, "MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.DEFORM.NUM_GROUPS", groups)
    model, release = load(arrays, cfg), Release(arrays, groups)
    with torch.no_grad():
        features = run(model, picture)
        conv4, conv5 = release.body(release.data(picture), offset_dilation=2)
        assert_close(features["res4"], conv4, rtol=1e-5, atol=1e-5)
        assert_close(features["res5"], conv5, rtol=1e-5, atol=1e-5)
        check_proposals(model, features, release.proposals(conv4, (8, 16, 32)))
        check_heads(model, features, release.rfcn(conv5, ROIS))


def check_proposals(model, features, expected):
    """All boxes before any suppression, with Detectron2's own decoding."""
    rpn = model.proposal_generator
    maps = [features["res4"]]
    anchors = rpn.anchor_generator(maps)
    logits, deltas = rpn.rpn_head(maps)
    _, count, rows, columns = logits[0].shape
    deltas = deltas[0].view(count, 4, rows, columns).permute(2, 3, 0, 1).reshape(1, -1, 4)
    (boxes,) = rpn._decode_proposals(anchors, [deltas])
    boxes = boxes.reshape(rows, columns, count // 3, 3, 4).transpose(2, 3)
    scores = logits[0][0].permute(1, 2, 0).reshape(rows, columns, count // 3, 3).mT.sigmoid()
    end = torch.tensor([0.0, 0, 1, 1])  # behind the last pixel
    assert_close(boxes, expected[0] + end, rtol=1e-5, atol=1e-3)
    assert_close(scores, expected[1], rtol=1e-5, atol=1e-6)


def check_heads(model, features, expected):
    heads = model.roi_heads.float()  # as Detectron2's Boxes are
    features = {name: value.float() for name, value in features.items()}
    boxes = ROIS[:, 1:] + torch.tensor([0.0, 0, 1, 1])
    logits, deltas = heads.predict(features, [Boxes(ROIS[:, 1:])])
    probabilities, decoded = expected
    assert_close(logits.softmax(1), probabilities.roll(-1, 1), rtol=1e-4, atol=1e-5)
    ours = heads.box_predictor.box2box_transform.apply_deltas(deltas, boxes)
    decoded = decoded[:, -ours.shape[1] :]  # without the background's
    end = torch.tensor([0.0, 0, 1, 1]).repeat(ours.shape[1] // 4)
    assert_close(ours, decoded + end, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("groups", [0, 4])
def test_faster_rcnn_computes_the_same(groups, picture):
    arrays = fill(shapes("rcnn", classes=6, anchors=12, groups=groups, **THIN_SHAPES))
    name = "faster_rcnn_R_101_dconv3_dpool_release" if groups else "faster_rcnn_R_101_release"
    cfg = config(f"COCO-Detection/{name}.yaml", *THIN, "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    model, release = load(arrays, cfg), Release(arrays, groups)
    with torch.no_grad():
        features = run(model, picture)
        conv4, conv5 = release.body(release.data(picture), offset_dilation=2)
        assert_close(features["res5"], conv5, rtol=1e-5, atol=1e-5)
        check_proposals(model, features, release.proposals(conv4, (4, 8, 16, 32)))
        check_heads(model, features, release.rcnn(conv5, ROIS))


@pytest.mark.parametrize("groups", [0, 1])
def test_deeplab_computes_the_same_where_pixels_lie_between_cells(groups, picture):
    arrays = fill(shapes("deeplab", classes=7, groups=groups, **THIN_SHAPES))
    name = "deeplab_R_101_dconv3_release" if groups else "deeplab_R_101_release"
    cfg = config(f"VOC-Segmentation/{name}.yaml", *THIN, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    model, release = load(arrays, cfg), Release(arrays, groups)
    height, width = picture.shape[:2]
    with torch.no_grad():
        features = run(model, picture)
        logits = model.sem_seg_head(features)[0][..., :height, :width]
        _, conv5 = release.body(release.data(picture), offset_dilation=1)
        expected = release.deeplab(conv5, height, width)
    inner = (slice(None), slice(None), slice(8, height - 8), slice(8, width - 8))
    assert_close(logits[inner], expected[inner], rtol=1e-5, atol=1e-4)  # ours is float32
    assert torch.equal(logits.argmax(1), expected.argmax(1))  # faded alike at the border


def test_colour_order_follows_the_config(picture):
    """The same network for a config that feeds RGB."""
    arrays = fill(shapes("deeplab", classes=7, **THIN_SHAPES))
    opts = [*THIN, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]
    bgr = load(arrays, config("VOC-Segmentation/deeplab_R_101_release.yaml", *opts))
    opts += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.15, 115.9, 103.06]]
    rgb = load(arrays, config("VOC-Segmentation/deeplab_R_101_release.yaml", *opts))
    with torch.no_grad():
        assert_close(run(bgr, picture)["res5"], run(rgb, picture[:, :, ::-1].copy())["res5"])


def test_a_box_layer_that_is_there_once_needs_a_word():
    arrays = fill(shapes("rfcn", classes=21, groups=4, **THIN_SHAPES))
    cfg = config(RFCN, *THIN)
    both = convert(arrays, "release", cfg)
    trained = {key: value for key, value in arrays.items() if not key.endswith("_test")}
    folded = dict(trained)
    for part in ("weight", "bias"):
        folded[f"arg:rfcn_bbox_{part}"] = arrays[f"arg:rfcn_bbox_{part}_test"]
    with pytest.raises(ConfigError, match=r"rfcn_bbox_weight_test is not.*--box-layer normalized"):
        convert(trained, "release", cfg)
    for source, word in ((trained, "normalized"), (folded, "folded")):
        once = convert(source, "release", cfg, box_layer=word)
        for part in ("weight", "bias"):
            name = f"roi_heads.bbox_pred.{part}"
            assert_close(once.weights[name], both.weights[name])


def test_a_file_becomes_a_file_that_the_config_loads(tmp_path):
    arrays = fill(shapes("rfcn", classes=21, groups=4, **THIN_SHAPES))
    theirs, ours = tmp_path / "rfcn_dcn_voc-0000.params", tmp_path / "rfcn_dcn_voc.pth"
    theirs.write_bytes(write_mxnet({name: value.numpy() for name, value in arrays.items()}))
    cfg = config(RFCN, *THIN)
    account = convert(read_source_file(str(theirs)), "release", cfg)
    ours.write_bytes(pack(account.weights))
    model = build_model(cfg)
    load_weights(model, str(ours))
    gamma = arrays["arg:bn4b22_branch2c_gamma"]
    assert torch.equal(model.backbone.res4[22].conv3.norm.weight, gamma)


def test_config_that_would_compute_something_else_is_refused():
    arrays = fill(shapes("rfcn", classes=21, groups=4, **THIN_SHAPES))
    with pytest.raises(ConfigError) as refusal:
        convert(arrays, "release", config("VOC-Detection/rfcn_R_101_dconv3_dpool.yaml", *THIN))
    words = str(refusal.value).partition("are used: ")[2]
    assert words == (
        'MODEL.PIXEL_MEAN "[103.06, 115.9, 123.15]" MODEL.DEFORM.STEM_POOL_AT_CORNER "True" '
        'MODEL.RFCN.ALIGNED "False"'
    )


def test_other_number_of_anchors_is_told():
    arrays = fill(shapes("rfcn", classes=21, anchors=12, groups=4, **THIN_SHAPES))
    with pytest.raises(ConfigError, match=r"for 12 anchors a cell, .*make 9; .*COCO: sizes 64"):
        convert(arrays, "release", config(RFCN, *THIN))


def test_what_does_not_fit_is_listed():
    arrays = fill(shapes("rfcn", classes=21, groups=4, **THIN_SHAPES))
    del arrays["arg:res5b_branch2b_offset_bias"]
    arrays["arg:res5d_branch2a_weight"] = torch.zeros(1)
    arrays["arg:rfcn_mask_weight"] = torch.zeros(1)
    arrays["arg:res3c_branch2a_weight"] = torch.zeros(1)  # another name of res3b2's
    arrays["arg:conv_new_1_bias"] = torch.zeros(11)
    account = convert(arrays, "release", config(RFCN, *THIN))
    assert not account.complete
    assert account.missing == ["backbone.res5.1.conv2_offset.bias"]
    assert account.unexpected == ["backbone.res5.3.conv1.weight"]
    assert account.unknown == ["rfcn_mask_weight", "res3c_branch2a_weight"]
    assert account.misshapen == [("roi_heads.conv_new.bias", (10,), (11,))]
    assert [line for line in account.lines() if line.split()[0].isupper()] == [
        "MISSING in the file: backbone.res5.1.conv2_offset.bias",
        "WRONG SHAPE: roi_heads.conv_new.bias is (10,) in the network, (11,) from the file",
        "NOT IN THE NETWORK of the config: backbone.res5.3.conv1.weight",
        "UNKNOWN name in the file: rfcn_mask_weight",
        "UNKNOWN name in the file: res3c_branch2a_weight",
    ]


def test_imagenet_classifier_fills_the_backbone():
    arrays = fill(shapes("resnet", classes=1000, **THIN_SHAPES))
    account = convert(arrays, "release", config(RFCN, *THIN))
    assert account.complete
    assert sorted(account.left_out) == ["fc1000_bias", "fc1000_weight"]
    assert all(key.startswith("backbone.") for key in account.weights)
    new = {key.split(".")[0] for key in account.new}
    assert new == {"backbone", "proposal_generator", "roi_heads"}
    assert sum("conv2_offset" in key for key in account.new) == 6


def test_upsampling_that_is_not_bilinear_is_unknown():
    arrays = fill(shapes("deeplab", classes=21, **THIN_SHAPES))
    arrays["arg:upsampling_weight"][3, 0, 4, 4] += 0.1
    account = convert(
        arrays, "release", config("VOC-Segmentation/deeplab_R_101_release.yaml", *THIN)
    )
    assert account.unknown == ["upsampling_weight"]
