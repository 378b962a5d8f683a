"""Detectors of MMDetection 2 and 3: Faster and Mask R-CNN on FPN, with DCN, DCNv2, dpool."""

import re
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from .conversion import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Conversion,
    adapt_box_layer,
    adapt_first_layer,
    check_settings,
    in_input_order,
)
from .resnet_names import rename_resnet

__all__ = ["convert_mmdet"]

_BOX_STD = (0.1, 0.1, 0.2, 0.2)
_PARAMETER = r"(weight|bias)"
_HEADS = "roi_heads"
# (pattern, replacement); a replacement may be a function of the match
_RULES: list[tuple[str, Any]] = [
    (rf"neck\.lateral_convs\.(\d)\.conv\.{_PARAMETER}", lambda m: _fpn("lateral", m)),
    (rf"neck\.fpn_convs\.(\d)\.conv\.{_PARAMETER}", lambda m: _fpn("output", m)),
    (rf"rpn_head\.rpn_conv\.{_PARAMETER}", r"proposal_generator.rpn_head.conv.\1"),
    (rf"rpn_head\.rpn_cls\.{_PARAMETER}", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (rf"rpn_head\.rpn_reg\.{_PARAMETER}", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (
        rf"roi_head\.bbox_head\.shared_fcs\.(\d)\.{_PARAMETER}",
        lambda m: f"{_HEADS}.box_head.fc{int(m[1]) + 1}.{m[2]}",
    ),
    (rf"roi_head\.bbox_head\.fc_cls\.{_PARAMETER}", rf"{_HEADS}.box_predictor.cls_score.\1"),
    (rf"roi_head\.bbox_head\.fc_reg\.{_PARAMETER}", rf"{_HEADS}.box_predictor.bbox_pred.\1"),
    (
        rf"roi_head\.bbox_roi_extractor\.roi_layers\.(\d)\.offset_fc\.(\d)\.{_PARAMETER}",
        rf"{_HEADS}.box_pooler.level_poolers.\1.offset_fc.\2.\3",
    ),
    (
        rf"roi_head\.mask_head\.convs\.(\d)\.conv\.{_PARAMETER}",
        lambda m: f"{_HEADS}.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}",
    ),
    (rf"roi_head\.mask_head\.upsample\.{_PARAMETER}", rf"{_HEADS}.mask_head.deconv.\1"),
    (rf"roi_head\.mask_head\.conv_logits\.{_PARAMETER}", rf"{_HEADS}.mask_head.predictor.\1"),
]


def convert_mmdet(source: Mapping[str, Tensor], cfg: CfgNode) -> Conversion:
    """Converts a detector trained with a config of MMDetection's ``configs/dcn``, or without DCN.

    - The pictures are RGB, divided by ImageNet's standard deviations: goes into the first layer.
    - ``conv2.conv_offset`` has mmcv's channels: for each group and tap (y, x), then, with DCNv2,
      the logits of the factors of all groups' taps. They are this package's.
    - Classes are 0 to C - 1, background last, as in Detectron2; version 1 had it first, under other
      names ("bbox_head.*"), which are unknown here.
    - Box deltas are multiplied by 0.1, 0.1, 0.2, 0.2 after the layer.
    - "dpool" has a branch with two hidden layers. The published models were trained with
      MMDetection's own operator, which rounds boxes and skips samples as the official release's.

    Args:
        source: the network's ``state_dict()``.
        cfg: of the network.

    Raises:
        ConfigError: the config's network would compute something else with these weights.
    """
    wanted: dict[str, Any] = {
        "MODEL.PIXEL_MEAN": in_input_order(cfg, IMAGENET_MEAN),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.DEFORM.STEM_POOL_AT_CORNER": False,
        "MODEL.DEFORM.OFFSET_DILATION": 0,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    }
    if any(".offset_fc." in name for name in source):
        wanted |= {
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "DeformRoIPool",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 4,
            "MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS": [1024, 1024],
            "MODEL.DEFORM_ROI_HEADS.ALIGNED": False,
            "MODEL.DEFORM_ROI_HEADS.GAMMA": 0.1,
        }
    else:
        wanted |= {
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
        }
    check_settings(cfg, wanted, "a detector of MMDetection")

    done = Conversion()
    for name, value in source.items():
        renamed = _rename(name)
        if renamed is None or renamed in done.weights:
            done.unknown.append(name)
            continue
        if renamed.endswith("stem.conv1.weight"):
            value = adapt_first_layer(value, cfg, IMAGENET_STD)
        elif ".bbox_pred." in renamed and len(value) % 4 == 0:
            shape = value.shape
            value = adapt_box_layer(value.reshape(-1, 4, *shape[1:]), cfg, _BOX_STD).reshape(shape)
        done.weights[renamed] = value
    return done


def _rename(name: str) -> str | None:
    if name.startswith("backbone."):
        inner = rename_resnet(name.removeprefix("backbone."))
        return None if inner is None else f"backbone.bottom_up.{inner}"
    for pattern, replacement in _RULES:
        found = re.fullmatch(pattern, name)
        if found:
            return replacement(found) if callable(replacement) else found.expand(replacement)
    return None


def _fpn(kind: str, found: re.Match[str]) -> str:
    return f"backbone.fpn_{kind}{int(found[1]) + 2}.{found[2]}"
