"""Which part of a network has how much; table 4's parameters."""

import time
from pathlib import Path

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from d2_deform.analysis import (
    FLOP_HANDLES,
    activations_by_part,
    assign_parts,
    fit_batch_norms,
    flops_by_part,
    parameters_by_part,
    prepare_input,
    random_picture,
    runtime_by_part,
)
from d2_deform.analysis import parts as parts_module
from d2_deform.engine import load_config
from d2_deform.layers import OffsetConv2d

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name, *opts):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *map(str, opts)]
    return load_config(str(CONFIGS / name), opts, with_data=False)


def build_without_memory(name, *opts):
    cfg = load(name, *opts)
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


@pytest.fixture(scope="module")
def rfcn():
    """A small deformable R-FCN and its input."""
    cfg = load("quickstart.yaml", "INPUT.MIN_SIZE_TEST", 64)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    inputs = [prepare_input(cfg, random_picture(64, 96))]
    fit_batch_norms(model, inputs)
    return model, inputs


def test_parts_of_rfcn(rfcn):
    parts = assign_parts(rfcn[0])
    assert parts[""] == "rest"
    assert parts["backbone"] == "backbone"
    assert parts["backbone.stem.conv1"] == "backbone.stem"
    assert parts["backbone.res5.1.conv2"] == "backbone.res5"
    assert parts["backbone.res5.1.conv2_offset"] == "backbone.res5.offsets"
    assert parts["proposal_generator.rpn_head.conv"] == "proposal_generator"
    assert parts["roi_heads.cls_score"] == "roi_heads.cls_score"
    assert parts["roi_heads.cls_pool.offset_conv"] == "roi_heads.cls_pool.offsets"
    assert parts.keys() == {name for name, _ in rfcn[0].named_modules()}


def test_parts_with_fpn():
    opts = ["MODEL.BACKBONE.NAME", "build_aligned_inception_resnet_fpn_backbone"]
    opts += ["MODEL.RESNETS.RES5_DILATION", 1]
    opts += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    opts += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    opts += ["MODEL.RPN.IN_FEATURES", ["p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
    parts = assign_parts(
        build_without_memory("VOC-Detection/rfcn_R_101.yaml", *opts, "MODEL.DEFORM.NUM_LAYERS", 1)
    )
    assert parts["backbone.fpn_lateral3"] == "backbone"
    assert parts["backbone.bottom_up.res5.0"] == "backbone.bottom_up.res5"
    offsets = parts["backbone.bottom_up.res5.2.conv_a2.conv_offset"]
    assert offsets == "backbone.bottom_up.res5.offsets"


def test_nothing_is_lost_or_counted_twice(rfcn):
    model, inputs = rfcn
    parameters = parameters_by_part(model)
    assert sum(parameters.values()) == sum(p.numel() for p in model.parameters())
    flops = flops_by_part(model, inputs)
    expected = FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES).total()
    assert sum(flops.values()) == expected > 0
    assert set(flops) == set(activations_by_part(model, inputs)) == set(parameters)


def test_flops_and_activations_of_parts(rfcn):
    """By hand: res5 has 128 channels on an 8 x 12 map, there are (10 + 1) x 3 x 3 score maps."""
    model, inputs = rfcn
    flops, activations = flops_by_part(model, inputs), activations_by_part(model, inputs)
    both = {"flops": flops, "activations": activations}
    cells = 8 * 12
    offsets = 3 * 18  # channels of the three offset convolutions
    assert flops["backbone.res5.offsets"] == cells * offsets * 128 * 9
    assert activations["backbone.res5.offsets"] == cells * offsets
    assert flops["roi_heads.conv_new"] == cells * 128 * 128
    score_maps = (10 + 1) * 3 * 3
    assert flops["roi_heads.cls_score"] == cells * 128 * score_maps
    fields = cells * 2 * score_maps  # and their pooling, of twice as many channels as the scores
    pooling = {name: 2 * counts["roi_heads.cls_pool"] for name, counts in both.items()}
    assert flops["roi_heads.cls_pool.offsets"] == fields * 128 + pooling["flops"]
    assert activations["roi_heads.cls_pool.offsets"] == fields + pooling["activations"]


class Clock:
    """Stands for the module ``time``; only modules make it advance."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Slow(nn.Module):
    def __init__(self, clock, seconds, *children):
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, nn.ModuleList(children)

    def forward(self, x):
        self.clock.now += self.seconds
        for child in self.inner:
            x = child(x)
        return x


class SlowOffsets(OffsetConv2d):
    def forward(self, x):
        self.clock.now += 0.25
        return x


def test_time_goes_to_the_innermost_part(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(parts_module, "time", clock)
    offsets = SlowOffsets(1, 1)
    offsets.clock = clock
    model = nn.Module()
    model.backbone = nn.Sequential()
    model.backbone.stem = Slow(clock, 1)
    model.backbone.res2 = Slow(clock, 2, offsets, Slow(clock, 4))

    def forward(x):
        clock.now += 8
        return model.backbone(x)

    model.forward = forward
    assert runtime_by_part(model, [{}], num_runs=3) == {
        "rest": 8,
        "backbone": 0,
        "backbone.stem": 1,
        "backbone.res2": 2 + 4,
        "backbone.res2.offsets": 0.25,
    }
    assert not any(module._forward_hooks for module in model.modules())


def test_median_run_is_taken(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(parts_module, "time", clock)
    durations = iter([100, 7, 5, 9])  # the first run warms up
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))

    def forward(_):
        clock.now += next(durations)

    model.forward = forward
    assert runtime_by_part(model, [{}], num_runs=3) == {"rest": 7}


def test_time_is_that_of_the_call(rfcn):
    model, inputs = rfcn
    start = time.perf_counter()
    seconds = runtime_by_part(model, inputs, num_runs=1)
    assert 0 < sum(seconds.values()) < time.perf_counter() - start
    assert all(seconds[part] > 0 for part in ("rest", "backbone.res5", "roi_heads.cls_pool"))


CONVOLUTIONS = {"backbone.res5.offsets": 3 * (512 * 9 + 1) * 18}


@pytest.mark.parametrize(
    "plain, deformable, added, total",
    [
        (
            "VOC-Detection/rfcn_R_101.yaml",
            "VOC-Detection/rfcn_R_101_dconv3_dpool.yaml",
            {
                **CONVOLUTIONS,
                "roi_heads.cls_pool.offsets": 2 * 21 * 49 * 1025,
                "roi_heads.bbox_pool.offsets": 2 * 49 * 1025,
            },
            2_458_786,
        ),
        (
            "VOC-Detection/faster_rcnn_R_101.yaml",
            "VOC-Detection/faster_rcnn_R_101_dconv3_dpool.yaml",
            {**CONVOLUTIONS, "roi_heads.box_pooler.offsets": (256 * 49 + 1) * 98},
            1_478_296,
        ),
        (
            "VOC-Segmentation/deeplab_R_101.yaml",
            "VOC-Segmentation/deeplab_R_101_dconv3.yaml",
            CONVOLUTIONS,
            248_886,
        ),
    ],
)
def test_parameters_that_the_deformable_networks_add(plain, deformable, added, total):
    """Table 4, 20 classes and one deformable group."""
    before = parameters_by_part(build_without_memory(plain))
    after = parameters_by_part(build_without_memory(deformable))
    difference = {part: after[part] - before.get(part, 0) for part in after}
    assert {part: count for part, count in difference.items() if count} == added
    assert sum(added.values()) == total
