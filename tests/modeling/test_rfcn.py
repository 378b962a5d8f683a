"""R-FCN's heads by plain arguments, and the whole detector from ``configs/Base-RFCN.yaml``."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from roi_inputs import PICTURE_SIZE, make_boxes, make_images, make_proposals
from torch import Tensor, nn

from d2_deform.config import add_deform_config
from d2_deform.modeling.meta_arch import RFCN
from d2_deform.modeling.roi_heads import RFCNOutputLayers, RFCNROIHeads

BASE_CONFIG = Path(__file__).parents[2] / "configs" / "Base-RFCN.yaml"
NUM_CLASSES, NUM_BINS, CHANNELS, STRIDE = 3, 3, 8, 16


def make_heads(**overrides) -> RFCNROIHeads:
    torch.manual_seed(0)
    arguments = {
        "in_feature": "res5",
        "in_channels": CHANNELS,
        "spatial_scale": 1 / STRIDE,
        "num_classes": NUM_CLASSES,
        "box_predictor": RFCNOutputLayers(
            box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
            num_classes=NUM_CLASSES,
            smooth_l1_beta=1.0,
            test_nms_thresh=0.3,
        ),
        "conv_dim": 6,
        "num_bins": NUM_BINS,
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "proposal_matcher": Matcher([0.5], [0, 1]),
    }
    return RFCNROIHeads(**{**arguments, **overrides})


def make_features(pictures: int = 2) -> dict[str, Tensor]:
    height, width = (side // STRIDE for side in PICTURE_SIZE)
    generator = torch.Generator().manual_seed(1)
    return {"res5": torch.randn(pictures, CHANNELS, height, width, generator=generator)}


def make_targets(*counts: int) -> list[Instances]:
    return [
        Instances(
            PICTURE_SIZE,
            gt_boxes=make_boxes(count, seed=10 + index),
            gt_classes=torch.arange(count) % NUM_CLASSES,
        )
        for index, count in enumerate(counts)
    ]


def enlarge(heads: RFCNROIHeads) -> RFCNROIHeads:
    """Weights, offsets included, large enough to tell outputs apart."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return heads


def with_constant_maps(heads: RFCNROIHeads) -> RFCNROIHeads:
    """Every channel of the position-sensitive maps is its bias everywhere."""
    nn.init.zeros_(heads.cls_score.weight)
    nn.init.zeros_(heads.bbox_pred.weight)
    return heads


@pytest.mark.parametrize("deform_pool", [False, True])
@pytest.mark.parametrize("agnostic, box_outputs", [(True, 4), (False, 4 * NUM_CLASSES)])
def test_shapes(deform_pool: bool, agnostic: bool, box_outputs: int) -> None:
    heads = enlarge(make_heads(deform_pool=deform_pool, cls_agnostic_bbox_reg=agnostic)).eval()
    scores, deltas = heads.predict(make_features(), [make_boxes(5, 0), make_boxes(2, 1)])
    assert scores.shape == (7, NUM_CLASSES + 1)
    assert deltas.shape == (7, box_outputs)
    detections, losses = heads(make_images(), make_features(), make_proposals(5, 2))
    assert losses == {} and len(detections) == 2
    for found in detections:
        assert found.pred_boxes.tensor.shape == (len(found), 4)
        assert len(found) > 0 and found.pred_classes.max() < NUM_CLASSES


@pytest.mark.parametrize("deform_pool", [False, True])
def test_vote_is_the_mean_over_the_bins(deform_pool: bool) -> None:
    heads = with_constant_maps(enlarge(make_heads(deform_pool=deform_pool)))
    if deform_pool:  # small offsets, so that no bin leaves the map
        for pool in (heads.cls_pool, heads.bbox_pool):
            with torch.no_grad():
                for parameter in pool.parameters():
                    parameter.mul_(0.01)
    bins = NUM_BINS**2
    with torch.no_grad():
        maps = dict(heads.named_parameters())
        maps["cls_score.bias"].copy_(torch.arange((NUM_CLASSES + 1) * bins, dtype=torch.float32))
        maps["bbox_pred.bias"].copy_(-torch.arange(4 * bins, dtype=torch.float32))
    boxes = Boxes(torch.tensor([[30.0, 20.0, 90.0, 100.0], [48.0, 40.0, 52.0, 41.0]]))
    scores, deltas = heads.predict(make_features(1), [boxes])
    # Class c holds channels 9 c to 9 c + 8, whose mean is 9 c + 4.
    torch.testing.assert_close(scores, torch.tensor([[4.0, 13.0, 22.0, 31.0]] * 2))
    torch.testing.assert_close(deltas, torch.tensor([[-4.0, -13.0, -22.0, -31.0]] * 2))


def test_new_offsets_are_rigid_pooling() -> None:
    rigid, deformable = make_heads(deform_pool=False), make_heads(deform_pool=True)
    missing, unexpected = deformable.load_state_dict(rigid.state_dict(), strict=False)
    assert not unexpected and all(".offset_conv." in name for name in missing)
    boxes = [make_boxes(4, 0), make_boxes(4, 1)]
    for ours, expected in zip(
        deformable.predict(make_features(), boxes),
        rigid.predict(make_features(), boxes),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    for pool in (deformable.cls_pool, deformable.bbox_pool):
        for parameter in pool.parameters():
            nn.init.constant_(parameter, 1.0)
    moved, _ = deformable.predict(make_features(), boxes)
    kept, _ = rigid.predict(make_features(), boxes)
    assert not torch.allclose(moved, kept)


def test_layers_start_as_the_release() -> None:
    heads = make_heads(in_channels=64, conv_dim=64)
    for name, value in heads.state_dict().items():
        if name.endswith(".weight") and "offset" not in name:
            assert value.std().item() == pytest.approx(0.01, rel=0.1), name
        else:
            assert not value.any(), name


@pytest.mark.parametrize("deform_pool", [False, True])
def test_state_dict_names(deform_pool: bool) -> None:
    modules = ["conv_new", "cls_score", "bbox_pred"]
    if deform_pool:
        modules += ["cls_pool.offset_conv", "bbox_pool.offset_conv"]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    state = make_heads(deform_pool=deform_pool).state_dict()
    assert set(state) == expected
    if deform_pool:
        bins = NUM_BINS**2
        assert len(state["cls_pool.offset_conv.bias"]) == 2 * bins * (NUM_CLASSES + 1)
        assert len(state["bbox_pool.offset_conv.bias"]) == 2 * bins


def test_parameters_of_the_paper() -> None:
    """Table 4, VOC: one group of offsets for each of 21 classes, one for the box."""
    counts = []
    for deform_pool in (False, True):
        with torch.device("meta"):
            predictor = RFCNOutputLayers(
                box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), num_classes=20
            )
            heads = make_heads(
                in_channels=2048,
                num_classes=20,
                box_predictor=predictor,
                conv_dim=1024,
                num_bins=7,
                deform_pool=deform_pool,
            )
        counts.append(sum(parameter.numel() for parameter in heads.parameters()))
    assert counts[0] == 1024 * 2049 + 49 * (21 + 4) * 1025
    assert counts[1] - counts[0] == 2 * 49 * (21 + 1) * 1025 == 2_209_900


def test_background_is_the_last_class() -> None:
    heads = with_constant_maps(make_heads()).eval()
    heads.box_predictor.box_selector.score_thresh = 0.5
    per_class = heads.state_dict()["cls_score.bias"].view(NUM_CLASSES + 1, -1)
    for winner in range(NUM_CLASSES + 1):
        per_class.zero_()[winner] = 10.0
        (found,), _ = heads(make_images(1), make_features(1), make_proposals(4))
        if winner == NUM_CLASSES:
            assert len(found) == 0
        else:
            assert len(found) > 0 and (found.pred_classes == winner).all()


@pytest.mark.parametrize(
    "deform_pool, loss_cls, loss_box", [(False, 1.691783, 0.342005), (True, 1.683321, 0.329959)]
)
def test_frozen_losses(deform_pool: bool, loss_cls: float, loss_box: float) -> None:
    heads = enlarge(make_heads(deform_pool=deform_pool))
    torch.manual_seed(3)
    with EventStorage():
        proposals, losses = heads(
            make_images(), make_features(), make_proposals(30, 20), make_targets(2, 1)
        )
    assert [len(p) for p in proposals] == [16, 16]
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert losses["loss_cls"].item() == pytest.approx(loss_cls, rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(loss_box, rel=1e-4)


@pytest.mark.parametrize("targets", [(0, 0), (2, 0)])
@pytest.mark.parametrize("proposals", [(0, 0), (0, 3)])
def test_training_without_proposals_or_targets(
    proposals: tuple[int, int], targets: tuple[int, int]
) -> None:
    heads = enlarge(make_heads())
    with EventStorage():
        _, losses = heads(
            make_images(), make_features(), make_proposals(*proposals), make_targets(*targets)
        )
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_inference_without_proposals() -> None:
    heads = make_heads().eval()
    for counts in ((0, 0), (0, 3)):
        found, _ = heads(make_images(), make_features(), make_proposals(*counts))
        assert len(found) == 2 and len(found[0]) == 0


def test_autocast() -> None:
    heads = enlarge(make_heads())
    torch.manual_seed(3)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        _, losses = heads(make_images(), make_features(), make_proposals(9, 9), make_targets(2, 1))
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())
    heads.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = heads(make_images(), make_features(), make_proposals(9, 9))
    assert len(found[0]) > 0


@pytest.fixture
def cfg() -> CfgNode:
    """Base-RFCN with a thin ResNet-18, three classes and small pictures, on CPU."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_file(str(BASE_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.RPN.CONV_DIMS = [16]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RFCN.CONV_DIM = 16
    cfg.TEST.AUG.MIN_SIZES = (96, 128)
    return cfg


@pytest.fixture
def model(cfg: CfgNode) -> RFCN:
    torch.manual_seed(0)
    return build_model(cfg)


def make_picture(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *PICTURE_SIZE), generator=generator, dtype=torch.uint8)


def test_model_is_a_generalized_rcnn(model: RFCN) -> None:
    assert type(model) is RFCN and isinstance(model, GeneralizedRCNN)
    assert isinstance(model.roi_heads, RFCNROIHeads)
    assert model.roi_heads.in_feature == "res5"
    assert model.proposal_generator.in_features == ["res4"]
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "backbone",
        "proposal_generator",
        "roi_heads",
    }


def test_model_learns_in_every_part(model: RFCN) -> None:
    targets = make_targets(2, 0)
    batch = [{"image": make_picture(i), "instances": targets[i]} for i in range(2)]
    with EventStorage():
        losses = model(batch)
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_model_predicts_in_the_picture_asked_for(model: RFCN) -> None:
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": make_picture(), "height": 64, "width": 80}])
    found = output["instances"]
    assert found.image_size == (64, 80) and len(found) > 0
    assert found.pred_boxes.tensor[:, 2].max() <= 80
    assert found.pred_boxes.tensor[:, 3].max() <= 64


def test_model_mines_hard_examples(cfg: CfgNode) -> None:
    cfg.MODEL.OHEM.ENABLED = True
    cfg.MODEL.OHEM.BATCH_SIZE_PER_IMAGE = 8
    model = build_model(cfg)
    learnt: list[int] = []
    losses_of = model.roi_heads.box_predictor.losses

    def count_and_compute(predictions, proposals):
        learnt.extend(len(of_image) for of_image in proposals)
        return losses_of(predictions, proposals)

    model.roi_heads.box_predictor.losses = count_and_compute
    targets = make_targets(2, 0)
    with EventStorage() as storage:
        losses = model([{"image": make_picture(i), "instances": targets[i]} for i in range(2)])
        assert storage.latest()["roi_head/num_bg_samples"][0] > 8
    assert learnt == [8, 8]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("rounds", [1, 2])
def test_test_time_augmentation_accepts_it(cfg: CfgNode, rounds: int) -> None:
    cfg.TEST.BOX_VOTING.ENABLED = rounds > 1
    torch.manual_seed(0)
    model = build_model(cfg)
    assert model.roi_heads.num_rounds == rounds
    model.eval()
    height, width = PICTURE_SIZE
    with torch.no_grad():
        (output,) = GeneralizedRCNNWithTTA(cfg, model)(
            [{"image": make_picture(), "height": height, "width": width}]
        )
    found = output["instances"]
    assert found.image_size == PICTURE_SIZE and len(found) > 0
    assert found.has("scores") and found.has("pred_classes")


def test_given_boxes_come_back(model: RFCN) -> None:
    model.eval()
    given = [Instances(PICTURE_SIZE, pred_boxes=make_boxes(2, 0), pred_classes=torch.arange(2))]
    with torch.no_grad():
        returned = model.inference([{"image": make_picture()}], given, do_postprocess=False)
    assert len(returned[0]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.MASK_ON", True], "boxes only"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["res4", "res5"]], "one feature map"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["res3"]], "OUT_FEATURES"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 0], "NUM_CLASSES"),
    ],
)
def test_wrong_settings_are_named(cfg: CfgNode, options: list, message: str) -> None:
    cfg.merge_from_list(options)
    shapes = {name: ShapeSpec(channels=8, stride=16) for name in ("res4", "res5")}
    with pytest.raises(ValueError, match=message):
        RFCNROIHeads(cfg, shapes)
