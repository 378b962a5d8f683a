"""DeepLab's head by plain arguments, and whole segmentors around it."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor, build_model
from detectron2.structures import polygons_to_bitmask
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.config import add_deform_config
from d2_deform.modeling.sem_seg import DeepLabHead
from d2_deform.solver import build_optimizer

COCO = Path(os.environ.get("DETECTRON2_DATASETS", "../shared/data/datasets")) / "coco"
CHANNELS, STRIDE, NUM_CLASSES = 8, 16, 3
IGNORE = 255


def make_head(**overrides) -> DeepLabHead:
    torch.manual_seed(0)
    arguments = {
        "in_feature": "res5",
        "in_channels": CHANNELS,
        "stride": STRIDE,
        "num_classes": NUM_CLASSES,
        "conv_dim": 6,
    }
    return DeepLabHead(**{**arguments, **overrides})


def make_features(height: int, width: int, pictures: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"res5": torch.randn(pictures, CHANNELS, height, width, generator=generator)}


def with_constant_scores(module: nn.Module, *scores: float) -> nn.Module:
    """Every pixel has the same logits."""
    for head in module.modules():
        if isinstance(head, DeepLabHead):
            nn.init.zeros_(head.score.weight)
            with torch.no_grad():
                head.score.bias.copy_(torch.tensor(scores))
    return module


class GivenScores(nn.Module):
    """Takes the place of ``score``."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores


def upsample(scores: Tensor, stride: int = STRIDE) -> Tensor:
    """What the head makes of a map of scores, Tensor[1, 3, h, w]."""
    head = make_head(stride=stride).eval()
    head.score = GivenScores(scores)
    logits, losses = head(make_features(*scores.shape[2:]))
    assert losses == {} and logits is not None
    return logits


def release_deconvolution(scores: Tensor) -> Tensor:
    """The release's: kernel 32 x 32 of bilinear weights, stride 16, crop offset 8."""
    taps = 1 - (torch.arange(32) - 15.5).abs() / 16
    kernel = (taps[:, None] * taps).expand(scores.shape[1], 1, 32, 32)
    height, width = (16 * side for side in scores.shape[2:])
    output = F.conv_transpose2d(scores, kernel, stride=16, groups=scores.shape[1])
    return output[:, :, 8 : 8 + height, 8 : 8 + width]


def test_two_layers_and_their_size() -> None:
    head = make_head(in_channels=2048, num_classes=21, conv_dim=1024)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "conv_new.weight": (1024, 2048, 1, 1),
        "conv_new.bias": (1024,),
        "score.weight": (21, 1024, 1, 1),
        "score.bias": (21,),
    }
    assert head.score.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not head.score.bias.any()


def test_scores_come_from_one_cell_through_a_relu() -> None:
    head = make_head(stride=1).eval()
    feature = make_features(2, 3)["res5"]
    logits, _ = head({"res5": feature})
    cell = feature[0, :, 1, 2]
    hidden = (head.conv_new.weight[:, :, 0, 0] @ cell).clamp(min=0)
    torch.testing.assert_close(logits[0, :, 1, 2], head.score.weight[:, :, 0, 0] @ hidden)


def test_a_cells_score_lies_in_the_middle_of_its_pixels() -> None:
    """Scores that grow by 1 a cell grow by 1/16 a pixel and are whole at 16 j + 7.5."""
    scores = torch.arange(4.0).expand(1, NUM_CLASSES, 5, 4)
    row = upsample(scores)[0, 0, 40]
    assert row.shape == (64,)
    assert (row[23] + row[24]).item() / 2 == 1
    assert (row[39] + row[40]).item() / 2 == 2
    torch.testing.assert_close(row[9:56] - row[8:55], torch.full((47,), 1 / 16))
    assert (row[:8] == 0).all() and (row[56:] == 3).all()  # the outermost cells go on


def test_upsampling_is_the_releases_deconvolution() -> None:
    scores = torch.randn(1, NUM_CLASSES, 4, 5, generator=torch.Generator().manual_seed(2))
    ours, theirs = upsample(scores), release_deconvolution(scores)
    assert ours.shape == theirs.shape == (1, NUM_CLASSES, 64, 80)
    torch.testing.assert_close(ours[:, :, 8:-8, 8:-8], theirs[:, :, 8:-8, 8:-8])
    # In the rim the deconvolution fades all scores of a pixel alike: to 1 - 7.5 / 16 at the edge.
    torch.testing.assert_close(theirs[0, :, 0, 40], ours[0, :, 0, 40] * (1 - 7.5 / 16))
    assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))
    # The other convention would not have done.
    corners = F.interpolate(scores, scale_factor=16, mode="bilinear", align_corners=True)
    assert (corners - theirs)[:, :, 8:-8, 8:-8].abs().max() > 0.1


def test_loss_by_hand() -> None:
    """Odds 1 : 1 : 2 everywhere; pictures of 20 x 24 pixels on maps of 2 x 2 cells."""
    head = with_constant_scores(make_head(loss_weight=0.5), 0.0, 0.0, math.log(2))
    targets = torch.full((2, 20, 24), IGNORE)
    targets[0, :10] = 1  # 240 pixels of probability 1/4
    targets[1, 19] = 2  # 24 of 1/2
    scores, losses = head(make_features(2, 2, pictures=2), targets)
    assert scores is None and losses.keys() == {"loss_sem_seg"}
    expected = 0.5 * (240 * math.log(4) + 24 * math.log(2)) / 264
    assert losses["loss_sem_seg"].item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_of_pixels_not_cells() -> None:
    """A border within a cell: the labels are not reduced to the map's size."""
    head = make_head()
    head.score = GivenScores(torch.tensor([[[[4.0, -4.0]], [[0.0, 0.0]], [[-99.0, -99.0]]]]))
    targets = torch.zeros(1, 16, 32, dtype=torch.int64)
    targets[:, :, 16:] = 1
    at_middle = head(make_features(1, 2), targets)[1]["loss_sem_seg"].item()
    targets[:, :, 12:] = 1
    within_cell = head(make_features(1, 2), targets)[1]["loss_sem_seg"].item()
    # By hand for one row: the first class is ahead by 4 at pixels 0 to 7, then by 3.75, 3.25, ...
    lead = np.clip(4 - (np.arange(32) - 7.5) / 2, -4, 4)
    for loss, border in ((at_middle, 16), (within_cell, 12)):
        margins = np.where(np.arange(32) < border, lead, -lead)
        assert loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert within_cell > at_middle


def test_nothing_to_learn_from_is_no_loss() -> None:
    head = make_head()
    loss = head(make_features(2, 2), torch.full((1, 32, 32), IGNORE))[1]["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in head.parameters())


def test_autocast() -> None:
    head = make_head()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(make_features(2, 2), torch.zeros(1, 32, 32, dtype=torch.int64))[1]
    assert loss["loss_sem_seg"].dtype == torch.float32
    loss["loss_sem_seg"].backward()
    assert head.conv_new.weight.grad.isfinite().all()


def make_cfg(*opts) -> CfgNode:
    """A thin ResNet-18 with DeepLab's head, three classes, on CPU."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_deform_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 16
    cfg.merge_from_list(list(opts))
    return cfg


def make_picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_pictures_of_two_sizes_train_together() -> None:
    """Neither is a multiple of the stride, and the smaller one's padding is not learnt from."""
    model = with_constant_scores(build_model(make_cfg()), 0.0, math.log(3), -99.0)
    assert isinstance(model, SemanticSegmentor)
    batch = [
        {
            "image": make_picture(*size),
            "sem_seg": torch.full(size, label),
        }
        for label, size in enumerate(((50, 64), (75, 90)))
    ]
    loss = model(batch)["loss_sem_seg"]
    small, large = 50 * 64, 75 * 90
    expected = (small * math.log(4) + large * math.log(4 / 3)) / (small + large)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_deformable", [0, 3])
def test_model_learns_in_every_part(num_deformable: int) -> None:
    torch.manual_seed(0)
    model = build_model(make_cfg("MODEL.DEFORM.NUM_LAYERS", num_deformable))
    labels = torch.randint(0, NUM_CLASSES, (64, 64), generator=torch.Generator().manual_seed(3))
    model([{"image": make_picture(64, 64), "sem_seg": labels}])["loss_sem_seg"].backward()
    names = [name for name, _ in model.named_parameters()]
    assert sum("offset.weight" in name for name in names) == num_deformable
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_prediction_has_the_size_asked_for() -> None:
    model = build_model(make_cfg()).eval()
    with torch.no_grad():
        outputs = model(
            [
                {"image": make_picture(50, 64), "height": 100, "width": 128},
                {"image": make_picture(75, 90)},
            ]
        )
    assert [tuple(output["sem_seg"].shape) for output in outputs] == [
        (NUM_CLASSES, 100, 128),
        (NUM_CLASSES, 75, 90),
    ]


def test_parameters_added_by_deformable_convolutions() -> None:
    """Table 4: 46.0 M -> 46.1 M; a ResNet-101 and the head have 44.62 M, and 0.249 M more."""

    def count(num_deformable: int) -> int:
        cfg = make_cfg("MODEL.DEFORM.NUM_LAYERS", num_deformable)
        cfg.MODEL.RESNETS.merge_from_other_cfg(get_cfg().MODEL.RESNETS)
        cfg.MODEL.RESNETS.DEPTH = 101
        cfg.MODEL.RESNETS.RES5_DILATION = 2
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 21
        cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 1024
        with torch.device("meta"):
            model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        return sum(parameter.numel() for parameter in model.parameters())

    body, conv_new, score = 42_394_816, (2048 + 1) * 1024, (1024 + 1) * 21
    assert count(0) == body + conv_new + score
    assert count(3) - count(0) == 3 * (512 * 3 * 3 + 1) * 18 == 248_886


def test_biases_may_learn_twice_as_fast() -> None:
    """As in the release's DeepLab: the head's and the offset layers' biases; no other has one."""
    cfg = make_cfg("MODEL.DEFORM.NUM_LAYERS", 1, "MODEL.RESNETS.NORM", "FrozenBN")
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {
        parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]
    }
    faster = {name for name, p in model.named_parameters() if rates[p] == 2 * cfg.SOLVER.BASE_LR}
    assert {name.removeprefix("sem_seg_head.") for name in faster} == {
        "backbone.res5.1.conv2_offset.bias",
        "conv_new.bias",
        "score.bias",
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res4", "res5"]),
            r"one feature map; MODEL.SEM_SEG_HEAD.IN_FEATURES is \['res4', 'res5'\]",
        ),
        (
            ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2"]),
            r"gives \['res5'\], not MODEL.SEM_SEG_HEAD.IN_FEATURES' 'p2'",
        ),
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0), "set MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        (("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 2), "label 2 would be class 2 of 3 and ignored"),
    ],
)
def test_a_wrong_config_gets_one_line(options, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DeepLabHead(make_cfg(*options), {"res5": ShapeSpec(channels=CHANNELS, stride=STRIDE)})
    assert "\n" not in str(error.value)


def draw_coco_labels(annotations: list[dict], height: int, width: int, ids: list[int]) -> Tensor:
    """0 background, 1 + class, 255 crowds."""
    labels = np.zeros((height, width), dtype=np.int64)
    for annotation in annotations:
        if annotation["iscrowd"]:
            x, y, w, h = (int(value) for value in annotation["bbox"])
            labels[y : y + h + 1, x : x + w + 1] = IGNORE
        else:
            mask = polygons_to_bitmask(
                [np.asarray(part) for part in annotation["segmentation"]], height, width
            )
            labels[mask] = 1 + ids.index(annotation["category_id"])
    return torch.from_numpy(labels)


@pytest.mark.skipif(not COCO.is_dir(), reason="the COCO data are not here")
def test_learns_a_genuine_picture() -> None:
    data = json.loads((COCO / "annotations" / "instances_val2017.json").read_text())
    picture = next(p for p in data["images"] if min(p["height"], p["width"]) > 300)
    height, width = picture["height"], picture["width"]
    annotations = [a for a in data["annotations"] if a["image_id"] == picture["id"]]
    labels = draw_coco_labels(
        annotations, height, width, [category["id"] for category in data["categories"]]
    )
    assert 2 <= len(labels.unique()) and labels.max() <= 80
    image = read_image(COCO / "val2017" / picture["file_name"], "BGR")
    quarter = {
        "image": torch.from_numpy(np.ascontiguousarray(image[::4, ::4].transpose(2, 0, 1))),
        "sem_seg": labels[::4, ::4].contiguous(),
    }
    torch.manual_seed(0)
    model = build_model(
        make_cfg("MODEL.DEFORM.NUM_LAYERS", 3, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 81)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(45):
        loss = model([quarter])["loss_sem_seg"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(81), rel=0.01)  # it begins with no opinion
    assert losses[-1] < 0.6
    model.eval()
    with torch.no_grad():
        (output,) = model([{**quarter, "height": height, "width": width}])
    assert output["sem_seg"].shape == (81, height, width)
    known = labels != IGNORE
    right = (output["sem_seg"].argmax(dim=0) == labels)[known].float().mean()
    background = (labels == 0)[known].float().mean()
    assert background < 0.7 and right > background + 0.08
