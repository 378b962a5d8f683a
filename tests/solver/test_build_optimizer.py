"""build_optimizer: learning rates by layer, weight decay, clipping, the log line."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from d2_deform import add_deform_config
from d2_deform.layers import DeformConv2d, DeformPSRoIPool, DeformRoIPool
from d2_deform.solver import build_optimizer


class Net(nn.Module):
    """One of every kind of layer that has a factor of its own."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.deform = DeformConv2d(4, 4, 3)
        self.conv2 = DeformConv2d(4, 4, 3, offset_branch=False)
        self.conv2_offset = self.conv2.make_offset_conv()
        self.conv_new = nn.Conv2d(4, 4, 1)
        self.cls_pool = DeformPSRoIPool(3, 3, 0.125, in_channels=4)
        self.pool = DeformRoIPool(3, 0.125, in_channels=4)


def make_cfg(**solver):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.SOLVER.BASE_LR = 1.0
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def group_of(optimizer, parameter):
    groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    assert len(groups) == 1
    return groups[0]


def rate(optimizer, layer, name="weight"):
    return pytest.approx(group_of(optimizer, getattr(layer, name))["lr"])


def test_sgd_is_detectron2s_by_default():
    net, cfg = Net(), make_cfg()
    ours, theirs = build_optimizer(cfg, net), detectron2_build_optimizer(cfg, net)
    assert type(ours) is type(theirs) is torch.optim.SGD
    for parameter in net.parameters():
        a, b = group_of(ours, parameter), group_of(theirs, parameter)
        assert {k: a[k] for k in a if k != "params"} == {k: b[k] for k in b if k != "params"}


def test_factors():
    net = Net()
    cfg = make_cfg(OFFSET_LR_FACTOR=0.5, ROI_OFFSET_LR_FACTOR=0.01, NEW_CONV_LR_FACTOR=3.0)
    optimizer = build_optimizer(cfg, net)
    for name in ("weight", "bias"):
        assert rate(optimizer, net.plain, name) == 1
        assert rate(optimizer, net.deform, name) == 1
        assert rate(optimizer, net.deform.conv_offset, name) == 0.5
        assert rate(optimizer, net.conv2_offset, name) == 0.5
        assert rate(optimizer, net.cls_pool.offset_conv, name) == 0.01
        assert rate(optimizer, net.pool.offset_fc, name) == 0.01
        assert rate(optimizer, net.conv_new, name) == 3


@pytest.mark.parametrize("optimizer_name, factor", [("SGD", 1.0), ("ADAMW", 0.05), ("AdamW", 0.05)])
def test_default_factor_depends_on_the_optimizer(optimizer_name, factor):
    net = Net()
    optimizer = build_optimizer(make_cfg(OPTIMIZER=optimizer_name), net)
    assert rate(optimizer, net.conv2_offset) == factor
    assert rate(optimizer, net.pool.offset_fc) == factor  # follows OFFSET_LR_FACTOR
    assert isinstance(optimizer, torch.optim.AdamW) == (factor != 1)


def test_bias_factor_multiplies_the_offset_factor():
    net = Net()
    optimizer = build_optimizer(make_cfg(BIAS_LR_FACTOR=2.0, OFFSET_LR_FACTOR=0.1), net)
    assert rate(optimizer, net.plain, "bias") == 2
    assert rate(optimizer, net.conv2_offset, "bias") == 0.2
    assert rate(optimizer, net.conv2_offset, "weight") == 0.1


def test_weight_decay_keys():
    net = Net()
    cfg = make_cfg(OPTIMIZER="ADAMW", WEIGHT_DECAY=0.05, WEIGHT_DECAY_NORM=0.01)
    optimizer = build_optimizer(cfg, net)
    assert group_of(optimizer, net.plain.bias)["weight_decay"] == 0.05
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    optimizer = build_optimizer(cfg, net)
    assert group_of(optimizer, net.plain.weight)["weight_decay"] == 0.05
    assert group_of(optimizer, net.plain.bias)["weight_decay"] == 0.0
    assert group_of(optimizer, net.norm.weight)["weight_decay"] == 0.01


def test_frozen_parameters_are_left_out():
    net = Net()
    net.plain.requires_grad_(False)
    optimizer = build_optimizer(make_cfg(), net)
    assert not any(p is net.plain.weight for g in optimizer.param_groups for p in g["params"])


@pytest.mark.parametrize("optimizer_name", ["SGD", "ADAMW"])
def test_clips_and_follows_the_schedule(optimizer_name):
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    cfg = make_cfg(
        OPTIMIZER=optimizer_name, WARMUP_ITERS=0, MAX_ITER=10, LR_SCHEDULER_NAME="WarmupCosineLR"
    )
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    optimizer = build_optimizer(cfg, net)
    scheduler = build_lr_scheduler(cfg, optimizer)
    net[0].weight.grad = torch.full((1, 1), 100.0)
    optimizer.step()
    scheduler.step()
    assert net[0].weight.grad.item() == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is 'LION'; expected one of SGD, ADAMW"):
        build_optimizer(make_cfg(OPTIMIZER="LION"), Net())


def test_logs_one_line_of_factors(monkeypatch):
    lines = []
    logger = logging.getLogger("d2_deform.solver.build")
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    build_optimizer(make_cfg(OPTIMIZER="ADAMW", ROI_OFFSET_LR_FACTOR=0.01), Net())
    (line,) = lines
    number = 2 * (4 * 18 * 9 + 18)  # two offset branches
    assert f"0.05 for convolution offsets ({number:,} parameters)" in line
    assert "0.01 for pooling offsets" in line
