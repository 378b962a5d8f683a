"""Layers that every network of the paper adds to a pre-trained backbone."""

from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

__all__ = ["build_conv_new", "init_new_layer"]


def build_conv_new(in_channels: int, out_channels: int) -> Conv2d:
    """The 1x1 convolution + ReLU on the backbone's last map (paper section 3, "conv_new").

    Heads keep it as their child ``conv_new``: ``SOLVER.NEW_CONV_LR_FACTOR`` finds it by that name.

    Args:
        in_channels: of the backbone's map.
        out_channels: 1024 in the paper, 256 for Faster R-CNN.
    """
    conv = Conv2d(in_channels, out_channels, kernel_size=1, activation=F.relu)
    init_new_layer(conv)
    return conv


def init_new_layer(layer: nn.Conv2d | nn.Linear) -> None:
    """Gaussian weights of standard deviation 0.01, bias zero: the official release's new layers."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
