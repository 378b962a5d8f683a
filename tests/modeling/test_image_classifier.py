"""ImageClassifier by numbers, and what detectors take over of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform import model_zoo
from d2_deform.engine import write_backbone
from d2_deform.modeling.backbone import AlignedInceptionResNet, build_deform_resnet
from d2_deform.modeling.meta_arch import ImageClassifier

MEAN, STD = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)


def thin_classifier(**kwargs: float) -> ImageClassifier:
    torch.manual_seed(0)
    backbone = build_deform_resnet(18, 0, stem_out_channels=4, res2_out_channels=4)
    return ImageClassifier(
        backbone=backbone, num_classes=3, pixel_mean=MEAN, pixel_std=STD, **kwargs
    )


def batch() -> list[dict[str, Tensor | int]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return [{"image": image, "label": label} for image, label in zip(images, (2, 0), strict=True)]


def logits(model: ImageClassifier) -> Tensor:
    images = torch.stack([given["image"] for given in batch()])
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    features = model.backbone((images - mean) / std)["res5"]
    return F.linear(features.mean((2, 3)), model.linear.weight, model.linear.bias)


def test_loss_by_hand() -> None:
    model = thin_classifier()
    probabilities = logits(model).softmax(1)
    expected = -(probabilities[0, 2].log() + probabilities[1, 0].log()) / 2
    losses = model(batch())
    assert set(losses) == {"loss_cls"}
    torch.testing.assert_close(losses["loss_cls"], expected)


@pytest.mark.parametrize(
    "backbone",
    [
        build_deform_resnet(18, 0, stem_out_channels=4, res2_out_channels=4),
        build_deform_resnet(50, 0, stem_out_channels=4, res2_out_channels=16, width_per_group=4),
        AlignedInceptionResNet(stem_out_channels=4, res2_out_channels=16),
    ],
    ids=["R_18", "R_50", "AIR"],
)
def test_blocks_start_as_their_shortcuts(backbone: nn.Module) -> None:
    ImageClassifier(
        backbone=backbone,
        num_classes=3,
        pixel_mean=MEAN,
        pixel_std=STD,
        zero_init_residual=True,
    )
    blocks = [
        block for name in ("res2", "res3", "res4", "res5") for block in getattr(backbone, name)
    ]
    for block in blocks:
        x = torch.randn(2, block.in_channels, 8, 8)
        shortcut = x if block.shortcut is None else block.shortcut(x)
        torch.testing.assert_close(block(x), F.relu(shortcut))


def test_label_smoothing_by_hand() -> None:
    model = thin_classifier(label_smoothing=0.3)
    targets = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    expected = -(targets * logits(model).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model(batch())["loss_cls"], expected)


def test_scores() -> None:
    model = thin_classifier().eval()
    outputs = model(batch())
    torch.testing.assert_close(
        torch.stack([output["scores"] for output in outputs]), logits(model).softmax(1)
    )


def test_is_the_networks_own_classifier_form() -> None:
    """64,381,800 parameters, as AlignedInceptionResNet(num_classes=1000)."""
    with torch.device("meta"):
        model = ImageClassifier(
            backbone=AlignedInceptionResNet(out_features=["res5"]),
            num_classes=1000,
            pixel_mean=MEAN,
            pixel_std=STD,
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 64_381_800


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"in_feature": "p5"}, r"IN_FEATURE\): p5 given, but the backbone gives \['res5'\]"),
        ({"label_smoothing": 1.5}, r"LABEL_SMOOTHING\): 1.5 given, accepted: 0 to 1"),
    ],
)
def test_flawed_arguments(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        thin_classifier(**kwargs)


def thin(name: str) -> CfgNode:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    return cfg


def with_learnt_statistics(model: nn.Module) -> nn.Module:
    """Gives every batch norm a mean and a variance of its own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.mark.parametrize(
    "classifier, detector, prefix",
    [
        ("R_50", "VOC-Detection/rfcn_R_50_dconv3_dpool", "backbone."),
        ("R_101", "VOC-Segmentation/deeplab_R_101_dconv3", "backbone."),
        ("R_50", "COCO-Detection/faster_rcnn_R_50_FPN_mdconv13", "backbone.bottom_up."),
        ("AIR", "COCO-Detection/rfcn_AIR_dconv3_dpool", "backbone."),
        ("AIR", "VOC-Segmentation/deeplab_AIR", "backbone."),
    ],
)
def test_detectors_take_the_whole_backbone(
    classifier: str, detector: str, prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = with_learnt_statistics(
        build_model(thin(f"ImageNet-Classification/classifier_{classifier}.yaml"))
    )
    weights = tmp_path / "backbone.pth"
    write_backbone(source, str(weights))
    assert list(tmp_path.iterdir()) == [weights]

    model = build_model(thin(f"{detector}.yaml"))
    found = DetectionCheckpointer(model)._load_model(torch.load(weights))
    assert found.unexpected_keys == [] and found.incorrect_shapes == []
    missing = [key for key in found.missing_keys if key.startswith(prefix)]
    assert all("offset" in key for key in missing)
    assert bool(missing) == ("dconv" in detector)

    taken = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    for key, value in source.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(taken[key], value), key
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert all(not isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())


def test_a_whole_checkpoint_of_the_classifier_fits_too(tmp_path: Path) -> None:
    source = build_model(thin("ImageNet-Classification/classifier_R_50.yaml"))
    DetectionCheckpointer(source, str(tmp_path)).save("model_final")
    model = build_model(thin("VOC-Detection/rfcn_R_50.yaml"))
    found = DetectionCheckpointer(model)._load_model(torch.load(tmp_path / "model_final.pth"))
    unexpected = {key for key in found.unexpected_keys if not key.endswith("num_batches_tracked")}
    assert unexpected == {"linear.weight", "linear.bias"}
    assert not any(key.startswith("backbone.") for key in found.missing_keys)
