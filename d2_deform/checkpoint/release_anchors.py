"""The release's anchors for Detectron2's: another order, slightly other shapes, the same boxes."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from d2_deform.engine.defaults import ConfigError

__all__ = ["adapt_anchor_layers", "release_anchor_sizes"]

_BASE = 16  # pixels; the anchors' stride as well


def release_anchor_sizes(ratios: Sequence[float], scales: Sequence[float]) -> Tensor:
    """Widths and heights of the release's anchors, whose shape is rounded before it is scaled.

    Args:
        ratios: height / width.
        scales: in units of 16 pixels.

    Returns:
        Tensor[ratios * scales, 2] in pixels: all scales of the first ratio, then of the next.
    """
    shapes = []
    for ratio in ratios:
        width = np.round(np.sqrt(_BASE * _BASE / ratio))
        shapes.append((width, np.round(width * ratio)))
    return torch.tensor([(w * s, h * s) for w, h in shapes for s in scales])


def adapt_anchor_layers(
    scores: tuple[Tensor, Tensor], deltas: tuple[Tensor, Tensor], cfg: CfgNode
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The RPN's last two layers for Detectron2's anchors.

    The release scores background (first half of the channels) and object (second half) by softmax;
    their difference is Detectron2's logit. Its anchors of ratio 1/2 are 184 x 96 where Detectron2's
    are 181 x 90.5; the deltas are stretched by that, so the boxes are the same.

    Args:
        scores: weight and bias, Tensor[2 * A, ...].
        deltas: weight and bias, Tensor[4 * A, ...]: x, y, width, height of every anchor.
        cfg: MODEL.ANCHOR_GENERATOR is read.

    Returns:
        Weight and bias of the logits (Tensor[A, ...]), and of the deltas (Tensor[4 * A, ...]).

    Raises:
        ConfigError: the config has another number of anchors.
    """
    generator = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = list(generator.SIZES[0]), list(generator.ASPECT_RATIOS[0])
    count = len(sizes) * len(ratios)
    given = {len(part) / 2 for part in scores} | {len(part) / 4 for part in deltas}
    if given != {count}:
        raise ConfigError(
            f"the weights are for {' or '.join(f'{n:g}' for n in sorted(given))} anchors a cell, "
            f"MODEL.ANCHOR_GENERATOR.SIZES {sizes} and ASPECT_RATIOS {ratios} make {count}; "
            "take the config of the same data set (COCO: sizes 64 to 512, VOC: 128 to 512)."
        )
    # Theirs are ratio by ratio, Detectron2's size by size.
    order = torch.arange(count).reshape(len(ratios), len(sizes)).T.flatten()
    theirs = release_anchor_sizes(ratios, [size / _BASE for size in sizes])[order]
    ours = torch.tensor(
        [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios]
    )
    stretch = theirs / ours

    logits = [(object_ - background)[order] for background, object_ in (p.chunk(2) for p in scores)]
    weight, bias = (part.reshape(count, 4, *part.shape[1:])[order].clone() for part in deltas)
    weight[:, :2] *= stretch.reshape(count, 2, *[1] * (weight.dim() - 2))
    bias[:, :2] *= stretch
    bias[:, 2:] += stretch.log()
    return (logits[0], logits[1]), (weight.flatten(0, 1), bias.flatten())
