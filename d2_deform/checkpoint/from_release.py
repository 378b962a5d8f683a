"""The paper's official release for MXNet: R-FCN, light Faster R-CNN, DeepLab, and its ResNet.

Names and orders are those of github.com/msracver/Deformable-ConvNets, ``*/symbols`` and
``*/core/callback.py``.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from d2_deform.engine.defaults import ConfigError

from .conversion import (
    Conversion,
    adapt_box_layer,
    adapt_first_layer,
    check_settings,
    in_input_order,
)
from .release_anchors import adapt_anchor_layers

__all__ = ["convert_release"]

_MEAN = (123.15, 115.9, 103.06)  # RGB; nothing is divided
_NO_STD = (1.0, 1.0, 1.0)
_BOX_STD = (0.1, 0.1, 0.2, 0.2)
_POOLING = {"ALIGNED": False, "GAMMA": 0.1}

_BODY = re.compile(
    r"(?P<kind>res|bn)(?P<stage>\d)(?P<letter>[a-z])(?P<number>\d*)_branch(?P<branch>1|2[abc])"
    r"(?P<offset>_offset)?_(?P<parameter>\w+)"
)
_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_PLAIN_LAYERS = {
    "RFCN": {"conv_new_1": "roi_heads.conv_new"},
    "GeneralizedRCNN": {
        "conv_new_1": "roi_heads.conv_new",
        "offset": "roi_heads.box_pooler.level_poolers.0.offset_fc",
        "fc_new_1": "roi_heads.box_head.fc1",
        "fc_new_2": "roi_heads.box_head.fc2",
    },
    "SemanticSegmentor": {"fc6": "sem_seg_head.conv_new", "score": "sem_seg_head.score"},
}
_BOX_LAYERS = {
    "RFCN": ("rfcn_bbox", "roi_heads.bbox_pred"),
    "GeneralizedRCNN": ("bbox_pred", "roi_heads.box_predictor.bbox_pred"),
}


def convert_release(
    source: Mapping[str, Tensor], cfg: CfgNode, box_layer: str | None = None
) -> Conversion:
    """Converts a network of the release, with 1 or 4 deformable groups or none.

    - The network sees RGB less the mean; for a config with BGR the first layer's channels turn.
    - Batch norms: gamma, beta, moving_mean, moving_var.
    - Offsets of convolutions are (y, x) for each group and tap, those of pooling (x, y) for each
      class and bin, both as here.
    - Its background is class 0, here the last, in the scores as in the pooling's offsets. DeepLab's
      classes stay.
    - R-FCN's 8 box outputs are those of background and object; the object's 4 are used.
    - Checkpoints hold the box layer twice: as it is trained, for normalised deltas, and under
      "*_test" multiplied by the standard deviations. The second counts. A file that has it once
      could be either, which ``box_layer`` tells.
    - Anchors: see :func:`~d2_deform.checkpoint.release_anchors.adapt_anchor_layers`.

    Args:
        source: arrays by their names in the file, "arg:" and "aux:" in front.
        cfg: of the network; ``*_release.yaml`` are made for it.
        box_layer: "normalized" or "folded", see above.

    Raises:
        ConfigError: the config's network would compute something else with these weights.
    """
    arrays = {name.partition(":")[2] or name: value for name, value in source.items()}
    done = Conversion()
    rest = dict(arrays)
    architecture = cfg.MODEL.META_ARCHITECTURE
    whole = "rpn_conv_3x3_weight" in rest or "score_weight" in rest
    _check(cfg, rest, whole)

    _convert_body(rest, cfg, done)
    if not whole:
        done.part = "backbone."
    else:
        for name, target in _PLAIN_LAYERS.get(architecture, {}).items():
            _move(rest, done, name, target)
        if architecture in _BOX_LAYERS:
            _convert_rpn(rest, cfg, done)
            _convert_boxes(rest, cfg, done, box_layer)
        if architecture == "RFCN":
            _convert_rfcn_scores(rest, cfg, done)
        elif architecture == "GeneralizedRCNN":
            _move_background_last(rest, done, "cls_score", "roi_heads.box_predictor.cls_score", 1)
        elif architecture == "SemanticSegmentor":
            _leave_out_upsampling(rest, done)
    for name in ("fc1000_weight", "fc1000_bias"):
        if rest.pop(name, None) is not None:
            done.left_out[name] = "the classifier of ImageNet"
    done.unknown = list(rest)
    return done


def _check(cfg: CfgNode, source: Mapping[str, Tensor], whole: bool) -> None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    wanted: dict[str, Any] = {
        "MODEL.PIXEL_MEAN": in_input_order(cfg, _MEAN),
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.DEFORM.STEM_POOL_AT_CORNER": True,
    }
    if whole:
        wanted["MODEL.RESNETS.RES5_DILATION"] = 2
    if whole and any("branch2b_offset" in name for name in source):
        dilation = 1 if architecture == "SemanticSegmentor" else 0
        wanted["MODEL.DEFORM.OFFSET_DILATION"] = dilation
    if whole and architecture in _BOX_LAYERS:
        wanted["MODEL.ANCHOR_GENERATOR.OFFSET"] = 0.5
    if "rfcn_cls_offset_t_weight" in source:
        wanted |= {f"MODEL.RFCN.{key}": value for key, value in _POOLING.items()}
        wanted["MODEL.RFCN.SAMPLING_RATIO"] = 4
    if "offset_weight" in source:
        wanted |= {f"MODEL.DEFORM_ROI_HEADS.{key}": value for key, value in _POOLING.items()}
        wanted["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"] = 4
    elif "fc_new_1_weight" in source:
        wanted["MODEL.ROI_BOX_HEAD.POOLER_TYPE"] = "ROIPool"
    check_settings(cfg, wanted, "a network of the official release")


def _convert_body(rest: dict[str, Tensor], cfg: CfgNode, done: Conversion) -> None:
    weight = rest.pop("conv1_weight", None)
    if weight is not None:
        done.weights["backbone.stem.conv1.weight"] = adapt_first_layer(weight, cfg, _NO_STD)
    for theirs, ours in _NORM.items():
        value = rest.pop(f"bn_conv1_{theirs}", None)
        if value is not None:
            done.weights[f"backbone.stem.conv1.norm.{ours}"] = value
    for name in list(rest):
        renamed = _rename_body(name)
        if renamed is not None and f"backbone.{renamed}" not in done.weights:
            done.weights[f"backbone.{renamed}"] = rest.pop(name)


def _rename_body(name: str) -> str | None:
    """ "res4b22_branch2b_weight" is res4's block 22; blocks may also be counted by letters."""
    found = _BODY.fullmatch(name)
    if found is None:
        return None
    block = int(found["number"]) if found["number"] else ord(found["letter"]) - ord("a")
    layer = f"res{found['stage']}.{block}.{_LAYERS[found['branch']]}"
    parameter = found["parameter"]
    if found["kind"] == "bn":
        return f"{layer}.norm.{_NORM[parameter]}" if parameter in _NORM else None
    if found["offset"]:
        return f"{layer}_offset.{parameter}" if parameter in ("weight", "bias") else None
    return f"{layer}.weight" if parameter == "weight" else None


def _move(rest: dict[str, Tensor], done: Conversion, name: str, target: str) -> None:
    for parameter in ("weight", "bias"):
        value = rest.pop(f"{name}_{parameter}", None)
        if value is not None:
            done.weights[f"{target}.{parameter}"] = value


def _convert_rpn(rest: dict[str, Tensor], cfg: CfgNode, done: Conversion) -> None:
    head = "proposal_generator.rpn_head"
    _move(rest, done, "rpn_conv_3x3", f"{head}.conv")
    theirs = ("rpn_cls_score", "rpn_bbox_pred")
    if all(f"{name}_{part}" in rest for name in theirs for part in ("weight", "bias")):
        scores, deltas = ((rest.pop(f"{name}_weight"), rest.pop(f"{name}_bias")) for name in theirs)
        ours = ("objectness_logits", "anchor_deltas")
        for name, layer in zip(ours, adapt_anchor_layers(scores, deltas, cfg), strict=True):
            done.weights[f"{head}.{name}.weight"], done.weights[f"{head}.{name}.bias"] = layer


def _convert_boxes(
    rest: dict[str, Tensor], cfg: CfgNode, done: Conversion, box_layer: str | None
) -> None:
    layer, target = _BOX_LAYERS[cfg.MODEL.META_ARCHITECTURE]
    for parameter in ("weight", "bias"):
        trained = rest.pop(f"{layer}_{parameter}", None)
        folded = rest.pop(f"{layer}_{parameter}_test", None)
        value, std = folded, (1.0, 1.0, 1.0, 1.0)
        if folded is not None and trained is not None:
            done.left_out[f"{layer}_{parameter}"] = f"{layer}_{parameter}_test is used instead"
        elif trained is not None:
            if box_layer is None:
                raise ConfigError(
                    f"{layer}_{parameter} is there, {layer}_{parameter}_test is not: the layer may "
                    "be as it was trained, for deltas in units of their standard deviations, or "
                    "multiplied by them. Say which: --box-layer normalized, or --box-layer folded."
                )
            value = trained
            if box_layer == "normalized":
                std = _BOX_STD
        if value is None:
            continue
        bins = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2 if layer == "rfcn_bbox" else 1
        if len(value) % (4 * bins):
            raise ConfigError(
                f"{layer}_{parameter} has {len(value)} channels, expected 4 for each of "
                f"{bins} bins and each box; set MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION."
            )
        boxes = value.reshape(-1, 4, bins, *value.shape[1:])[1:]  # the first is the background's
        boxes = adapt_box_layer(boxes, cfg, std)
        done.weights[f"{target}.{parameter}"] = boxes.reshape(-1, *value.shape[1:])


def _convert_rfcn_scores(rest: dict[str, Tensor], cfg: CfgNode, done: Conversion) -> None:
    """Channels are class by class, within it x and y of the offsets, then bin by bin."""
    _move(rest, done, "rfcn_bbox_offset_t", "roi_heads.bbox_pool.offset_conv")
    bins = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2
    for name, target, channels in (
        ("rfcn_cls", "roi_heads.cls_score", bins),
        ("rfcn_cls_offset_t", "roi_heads.cls_pool.offset_conv", 2 * bins),
    ):
        _move_background_last(rest, done, name, target, channels)


def _move_background_last(
    rest: dict[str, Tensor], done: Conversion, name: str, target: str, channels: int
) -> None:
    for parameter in ("weight", "bias"):
        value = rest.pop(f"{name}_{parameter}", None)
        if value is not None:
            done.weights[f"{target}.{parameter}"] = value.roll(-channels, 0)


def _leave_out_upsampling(rest: dict[str, Tensor], done: Conversion) -> None:
    """The release's deconvolution, if it is the bilinear one that the head does by itself."""
    kernel = rest.get("upsampling_weight")
    if kernel is None:
        return
    size = kernel.shape[-1]
    ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / (size / 2)
    if torch.allclose(kernel.float(), (ramp[:, None] * ramp).expand_as(kernel), atol=1e-5):
        del rest["upsampling_weight"]
        done.left_out["upsampling_weight"] = "bilinear upsampling, which the network does by itself"
