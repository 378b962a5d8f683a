"""OffsetMonitor: what it writes down, when it looks, whom it warns of."""

import logging

import pytest
import torch
from detectron2.engine import TrainerBase
from torch import nn

from d2_deform.engine import OffsetMonitor
from d2_deform.layers import DeformConv2d, DeformPSRoIPool, ModulatedDeformConv2d


class Net(nn.Module):
    def __init__(self, layer=DeformConv2d):
        super().__init__()
        self.conv = layer(2, 2, 3, padding=1)
        self.pool = DeformPSRoIPool(2, 2, 1.0, in_channels=2)
        self.rois = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]])

    def forward(self):
        feature = self.conv(torch.ones(1, 2, 6, 8))
        score = torch.ones(1, 4, 6, 8)
        return self.pool(score, self.rois, feature).sum()


class Trainer(TrainerBase):
    """Runs the model and counts the hooks that it finds on it."""

    def __init__(self, model, period):
        super().__init__()
        self.model = model
        self.hooked = []
        self.register_hooks([OffsetMonitor(period)])

    def run_step(self):
        layers = (self.model.conv.conv_offset, self.model.pool.offset_conv)
        self.hooked.append([len(layer._forward_hooks) for layer in layers])
        self.model()

    def values(self, name):
        return [value for value, _ in self.storage.history(name).values()]


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_deform"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="d2_deform")
    return caplog


def set_offset(layer, value):
    nn.init.constant_(layer.bias, value)


def test_writes_mean_and_max_every_period(warnings):
    net = Net()
    set_offset(net.conv.conv_offset, -1.5)
    net.conv.conv_offset.bias.data[0] = -2.0
    set_offset(net.pool.offset_conv, 2.0)
    trainer = Trainer(net, period=3)
    trainer.train(0, 6)

    assert trainer.hooked == [[0, 0], [0, 0], [1, 1]] * 2  # no work on other iterations
    assert trainer.values("offset/conv.conv_offset/mean") == pytest.approx([27.5 / 18] * 2)
    assert trainer.values("offset/conv.conv_offset/max") == pytest.approx([2.0] * 2)
    assert trainer.values("offset/pool.offset_conv/mean") == pytest.approx([0.2] * 2)  # * gamma
    assert not net.conv.conv_offset._forward_hooks
    assert not warnings.messages


def test_mask_of_v2_is_no_offset():
    net = Net(ModulatedDeformConv2d)
    net.conv.conv_offset.bias.data[18:] = 100.0
    trainer = Trainer(net, period=1)
    trainer.train(0, 1)
    assert trainer.values("offset/conv.conv_offset/max") == [0.0]


def test_warns_once_of_a_layer_that_outgrows_its_map(warnings):
    net = Net()
    set_offset(net.conv.conv_offset, 3.1)  # the map is 6 x 8
    Trainer(net, period=1).train(0, 4)
    assert len(warnings.messages) == 1
    for part in ("conv.conv_offset", "3.1 cells", "6 x 8", "SOLVER.OFFSET_LR_FACTOR"):
        assert part in warnings.messages[0]


def test_warns_of_bins_that_leave_their_roi(warnings):
    net = Net()
    set_offset(net.pool.offset_conv, 6.0)  # 0.6 of the RoI
    Trainer(net, period=1).train(0, 2)
    assert len(warnings.messages) == 1
    assert (
        "pool.offset_conv" in warnings.messages[0]
        and "SOLVER.ROI_OFFSET_LR_FACTOR" in warnings.messages[0]
    )


def test_warns_of_nan(warnings):
    net = Net()
    set_offset(net.conv.conv_offset, float("nan"))
    Trainer(net, period=1).train(0, 1)
    assert any("conv.conv_offset" in message for message in warnings.messages)


def test_no_roi_is_no_value():
    net = Net()
    net.rois = torch.zeros(0, 5)
    trainer = Trainer(net, period=1)
    trainer.train(0, 1)
    assert "offset/conv.conv_offset/mean" in trainer.storage.histories()


def test_model_without_offsets():
    net = Net()
    net.conv.conv_offset = None
    trainer = Trainer(nn.Identity(), period=1)
    trainer.run_step = lambda: None
    trainer.train(0, 2)
    assert not trainer.storage.histories()


def test_period_must_be_positive():
    with pytest.raises(ValueError, match="period: 0"):
        OffsetMonitor(0)
