"""ImageNet classifiers of torchvision and timm, for the backbone."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from .conversion import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Conversion,
    adapt_first_layer,
    backbone_prefix,
    check_settings,
    in_input_order,
)
from .resnet_names import rename_resnet

__all__ = ["convert_classifier"]


def convert_classifier(source: Mapping[str, Tensor], cfg: CfgNode) -> Conversion:
    """Converts a ResNet of torchvision or timm ("resnet18" to "resnet152", and "resnext*").

    They see RGB from 0 to 1, less the mean and divided by the standard deviation of ImageNet, which
    goes into the first convolution; and they have a stage's stride in its first 3x3 convolution.

    Args:
        source: the network's ``state_dict()``.
        cfg: of the network, with a ResNet of the same depth.

    Raises:
        ConfigError: the config's network would compute something else with these weights.
    """
    wanted: dict[str, Any] = {"MODEL.PIXEL_MEAN": in_input_order(cfg, IMAGENET_MEAN)}
    if cfg.MODEL.RESNETS.DEPTH >= 50:
        wanted["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    wanted["MODEL.DEFORM.STEM_POOL_AT_CORNER"] = False
    check_settings(cfg, wanted, "a ResNet of torchvision or timm")

    prefix = backbone_prefix(cfg)
    classifies = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    done = Conversion(part="" if classifies else prefix)
    for name, value in source.items():
        renamed = rename_resnet(name)
        if renamed == "stem.conv1.weight":
            value = adapt_first_layer(value, cfg, IMAGENET_STD)
        if renamed is not None and prefix + renamed not in done.weights:
            done.weights[prefix + renamed] = value
        elif name in ("fc.weight", "fc.bias"):
            if classifies:
                done.weights[name.replace("fc", "linear")] = value
            else:
                done.left_out[name] = "the classifier of ImageNet"
        else:
            done.unknown.append(name)
    return done
