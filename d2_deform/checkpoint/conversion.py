"""What every conversion has in common: its result, what it asks of the config, the first layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from d2_deform.engine.defaults import ConfigError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Conversion",
    "adapt_box_layer",
    "adapt_first_layer",
    "backbone_prefix",
    "check_settings",
]

# Of ImageNet's pictures, RGB, 0 to 255; torchvision, timm and MMDetection use them
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass
class Conversion:
    """Weights under this package's names, and what became of every other name of the source.

    Attributes:
        weights: by name in the network.
        left_out: reason by name in the source, for what has no place in the network by design.
        unknown: names in the source that no rule is about, or another name's place.
        part: beginning of the names that the source is expected to fill; "" is the whole network.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    part: str = ""


def check_settings(cfg: CfgNode, wanted: Mapping[str, Any], source: str) -> None:
    """Raises a ConfigError that says what to add unless the config is what the weights fit.

    Names and shapes of the weights would be the same, and the network another one.

    Args:
        cfg: of the network.
        wanted: value by key; lists of numbers are compared to a hundredth.
        source: where the weights are from, for the message.
    """
    differing = {key: value for key, value in wanted.items() if not _equal(_get(cfg, key), value)}
    if differing:
        options = " ".join(f'{key} "{value}"' for key, value in differing.items())
        raise ConfigError(
            f"{source} needs other settings than the config has. Add these here, and wherever the "
            f"weights are used: {options}"
        )


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _equal(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return len(given) == len(wanted) and all(
            _equal(one, other) for one, other in zip(given, wanted, strict=True)
        )
    if isinstance(wanted, float):
        return abs(given - wanted) < 0.01
    return bool(given == wanted)


def in_input_order(cfg: CfgNode, rgb: Sequence[float]) -> list[float]:
    """Three numbers for red, green and blue in the order of INPUT.FORMAT."""
    return list(rgb) if cfg.INPUT.FORMAT == "RGB" else list(rgb)[::-1]


def adapt_first_layer(weight: Tensor, cfg: CfgNode, std: Sequence[float]) -> Tensor:
    """The first convolution for the pictures that the config feeds.

    It is exact, at the border too: both inputs are zero where the pixel is the mean. Another mean
    could not be made up for, since the convolution pads with zeros; see :func:`check_settings`.

    Args:
        weight: Tensor[out, 3, kh, kw] for red, green, blue.
        cfg: INPUT.FORMAT and MODEL.PIXEL_STD are read.
        std: what the source divides red, green and blue by, on pixels from 0 to 255.
    """
    if weight.dim() != 4 or weight.shape[1] != 3:
        return weight  # no such layer: its shape will be found wrong
    if cfg.INPUT.FORMAT != "RGB":
        weight = weight.flip(1)
    ratio = torch.tensor(cfg.MODEL.PIXEL_STD) / torch.tensor(in_input_order(cfg, std))
    return weight * ratio[:, None, None]


def adapt_box_layer(parameter: Tensor, cfg: CfgNode, std: Sequence[float]) -> Tensor:
    """A layer that predicts box deltas, for MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS.

    Args:
        parameter: weight or bias, Tensor[boxes, 4, ...] for x, y, width and height.
        cfg: the config; Detectron2 divides the layer's output by those weights.
        std: what the source multiplies its output by.
    """
    factor = torch.tensor(std) * torch.tensor(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    return parameter * factor.reshape(4, *[1] * (parameter.dim() - 2))


def backbone_prefix(cfg: CfgNode) -> str:
    """Beginning of the names of a ResNet's weights in the network."""
    return "backbone.bottom_up." if "fpn" in cfg.MODEL.BACKBONE.NAME else "backbone."
