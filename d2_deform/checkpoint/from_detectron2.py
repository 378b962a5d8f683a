"""Detectron2's own zoo: its names are this package's."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from torch import Tensor

from .conversion import Conversion

__all__ = ["convert_detectron2"]

_NOT_LEARNT = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.")


def convert_detectron2(source: Mapping[str, Tensor], cfg: CfgNode) -> Conversion:
    """Takes every weight as it is; buffers of old versions that the config gives are left out.

    ``DetectionCheckpointer`` reads the zoo's files too. What a conversion adds: every name is
    accounted for, and the new file is no pickle.

    Args:
        source: a network's weights by name.
        cfg: not read; every conversion takes one.
    """
    done = Conversion()
    for name, value in source.items():
        if name.startswith(_NOT_LEARNT):
            done.left_out[name] = "not learnt; the config gives it"
        else:
            done.weights[name] = value
    return done
