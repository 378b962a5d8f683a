"""configs/common/models: the same networks as the yaml files, by LazyConfig."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import d2_deform.modeling  # noqa: F401  registers the parts
from d2_deform import model_zoo


def make_rfcn_deformable(lazy: Any) -> None:
    lazy.model.backbone.num_deform_layers = 3
    lazy.model.roi_heads.deform_pool = True


def make_faster_rcnn_deformable(lazy: Any) -> None:
    lazy.model.backbone.num_deform_layers = 3
    lazy.model.roi_heads.box_pooler = lazy.deform_box_pooler


def make_backbone_deformable(lazy: Any) -> None:
    lazy.model.backbone.num_deform_layers = 3


def leave_plain(lazy: Any) -> None:
    pass


NETWORKS = [
    ("rfcn", leave_plain, "VOC-Detection/rfcn_R_101.yaml"),
    ("rfcn", make_rfcn_deformable, "VOC-Detection/rfcn_R_101_dconv3_dpool.yaml"),
    ("faster_rcnn", leave_plain, "VOC-Detection/faster_rcnn_R_101.yaml"),
    (
        "faster_rcnn",
        make_faster_rcnn_deformable,
        "VOC-Detection/faster_rcnn_R_101_dconv3_dpool.yaml",
    ),
    ("category_aware_rpn", leave_plain, "VOC-Ablation/category_aware_rpn_R_101.yaml"),
    (
        "category_aware_rpn",
        make_backbone_deformable,
        "VOC-Ablation/category_aware_rpn_R_101_dconv3.yaml",
    ),
    ("deeplab", leave_plain, "VOC-Segmentation/deeplab_R_101.yaml"),
    ("deeplab", make_backbone_deformable, "VOC-Segmentation/deeplab_R_101_dconv3.yaml"),
]


def settings(model: nn.Module) -> dict[str, str]:
    """Every plain value that a module of the network keeps, by the module's name and its own."""
    kept = {}
    for name, module in model.named_modules():
        kept.update({f"{name}.{key}": show(value) for key, value in plain(vars(module)).items()})
        for part in ("anchor_matcher", "proposal_matcher", "box2box_transform", "box_selector"):
            if hasattr(module, part):
                kept[f"{name}.{part}"] = show(plain(vars(getattr(module, part))))
    return kept


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is not read: thresholds beside a BoxSelector, and weights of 1 written out."""
    unread = ("_", "test_", "loss_weight")
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(unread) and isinstance(value, (int, float, str, Sequence, dict))
    }


def show(value: Any) -> str:
    """Text that is the same for 1/9 and 0.1111, for 10 and 10.0, and for a list and a tuple."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return str([show(one) for one in value])
    if isinstance(value, dict):
        return str({key: show(one) for key, one in sorted(value.items())})
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


@pytest.mark.parametrize("name, change, yaml", NETWORKS)
def test_is_the_network_of_the_yaml(name: str, change: Callable[[Any], None], yaml: str) -> None:
    lazy = LazyConfig.load(model_zoo.get_config_file(f"common/models/{name}.py"))
    change(lazy)
    with torch.device("meta"):
        model = instantiate(lazy.model)
        cfg = model_zoo.get_config(yaml)
        other = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in other.state_dict().items()}
    assert settings(model) == settings(other)


@pytest.mark.parametrize("backbone", ["resnet", "aligned_inception_resnet"])
def test_backbones_are_interchangeable(backbone: str) -> None:
    lazy = LazyConfig.load(model_zoo.get_config_file("common/models/rfcn.py"))
    parts = LazyConfig.load(model_zoo.get_config_file("common/models/dilated_c5.py"))
    lazy.model.backbone = parts[backbone]
    with torch.device("meta"):
        shapes = instantiate(lazy.model).backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "res4": (1024, 16),
        "res5": (2048, 16),
    }


def test_learns_a_step() -> None:
    lazy = LazyConfig.load(model_zoo.get_config_file("common/models/rfcn.py"))
    make_rfcn_deformable(lazy)
    lazy.model.backbone.update(depth=50, norm="BN", freeze_at=0)
    lazy.model.proposal_generator.anchor_generator.sizes = [[16, 32, 64]]
    torch.manual_seed(0)
    model = instantiate(lazy.model)
    target = Instances((96, 128))
    target.gt_boxes = Boxes(torch.tensor([[20.0, 16.0, 84.0, 80.0]]))
    target.gt_classes = torch.tensor([3])
    with EventStorage():
        losses = model([{"image": torch.rand(3, 96, 128) * 255, "instances": target}])
    sum(losses.values()).backward()
    assert model.roi_heads.cls_pool.offset_conv.weight.grad.abs().sum() > 0
