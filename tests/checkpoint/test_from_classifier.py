"""ImageNet classifiers of torchvision and timm: the backbone computes what theirs does."""

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from test_from_release import assert_close, config
from torch import nn

from d2_deform.checkpoint import convert
from d2_deform.engine import ConfigError

RFCN = "VOC-Detection/rfcn_R_50_dconv3_dpool.yaml"
CLASSIFIER = "ImageNet-Classification/classifier_R_50.yaml"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
STRIDE = ("MODEL.RESNETS.STRIDE_IN_1X1", False)
BASIC = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.DEFORM.NUM_LAYERS", 0, "MODEL.RFCN.DEFORM_POOL", False),
]


def disturb(network):
    """New networks' batch norms do nothing; trained ones do."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def their_maps(network, picture_bgr):
    """conv4 and conv5 of an RGB picture from 0 to 1, normalised."""
    x = torch.as_tensor(picture_bgr[:, :, ::-1].copy()).permute(2, 0, 1) / 255
    x = ((x - MEAN[:, None, None]) / STD[:, None, None])[None]
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    conv4 = network.layer3(network.layer2(network.layer1(x)))
    return conv4, network.layer4(conv4)


@pytest.mark.parametrize(
    "build, opts",
    [
        (torchvision.models.resnet18, [*BASIC, "MODEL.PIXEL_STD", [57.375, 57.12, 58.395]]),
        (torchvision.models.resnet50, STRIDE),
        (
            torchvision.models.resnet50,
            [*STRIDE, "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]],
        ),
        ("timm resnet50", STRIDE),
    ],
)
def test_backbone_computes_the_same(build, opts):
    """With res5 at stride 32, as they are trained; offsets are zero."""
    if isinstance(build, str):
        timm = pytest.importorskip("timm")
        network = disturb(timm.create_model("resnet50"))
        network.relu = network.act1
    else:
        network = disturb(build())
    cfg = config(RFCN, "MODEL.RESNETS.RES5_DILATION", 1, *opts)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RPN.CONV_DIMS = "RFCN", [8]
    account = convert(network.state_dict(), "torchvision", cfg)
    assert account.complete, account.lines()
    model = build_model(cfg).eval()
    assert not model.load_state_dict(account.weights, strict=False).unexpected_keys
    picture = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    fed = picture if cfg.INPUT.FORMAT == "BGR" else picture[:, :, ::-1]
    image = torch.as_tensor(fed.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        ours = model.backbone((image - model.pixel_mean) / model.pixel_std)
        conv4, conv5 = their_maps(network, picture)
    # rounding grows with the size of what is added up on the way
    scale = conv5.abs().max().item()
    assert_close(ours["res4"], conv4, rtol=1e-4, atol=1e-5 * scale)
    assert_close(ours["res5"], conv5, rtol=1e-4, atol=1e-5 * scale)


def state(depth, classes=1000):
    with torch.device("meta"):
        network = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    return {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    "name, depth, opts, prefix",
    [
        (RFCN, 50, STRIDE, "backbone."),
        ("VOC-Detection/rfcn_R_101.yaml", 101, STRIDE, "backbone."),
        ("COCO-Detection/faster_rcnn_R_50_FPN_mdconv13.yaml", 50, STRIDE, "backbone.bottom_up."),
        (RFCN, 18, BASIC, "backbone."),
    ],
)
def test_every_tensor_finds_its_place(name, depth, opts, prefix):
    account = convert(state(depth), "timm", config(name, *opts))
    assert account.complete, account.lines()
    assert all(key.startswith(prefix) for key in account.weights)
    assert {"fc.weight", "fc.bias"} == set(account.left_out)
    new = [key for key in account.new if key.startswith("backbone.") and "fpn_" not in key]
    assert all("_offset." in key for key in new)


def test_a_classifier_keeps_its_last_layer():
    account = convert(
        state(50, 10),
        "torchvision",
        config(CLASSIFIER, *STRIDE, "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 10),
    )
    assert account.complete and not account.left_out and not account.new, account.lines()
    assert account.weights["linear.weight"].shape == (10, 2048)


def test_what_does_not_fit_is_told():
    cfg = config(RFCN, *STRIDE)
    deep_stem = {
        f"conv1.{i}.weight" if key == "conv1.weight" else key: value
        for i, (key, value) in enumerate(state(50).items())
    }
    account = convert(deep_stem, "timm", cfg)  # as timm's "resnet50d"
    assert account.unknown == ["conv1.0.weight"]
    assert account.missing == ["backbone.stem.conv1.weight"]
    account = convert(state(101), "torchvision", cfg)
    assert "backbone.res4.6.conv1.weight" in account.unexpected
    with pytest.raises(ConfigError, match=r'add|Add these.*MODEL\.RESNETS\.STRIDE_IN_1X1 "False"'):
        convert(state(50), "torchvision", config(RFCN))
