"""Weights that do not fit a backbone are refused; what lies behind it does not matter."""

import re

import pytest
import torch
from torch import nn

from d2_deform.engine import ConfigError, load_backbone_weights
from d2_deform.engine.weights import load_weights
from d2_deform.layers import DeformConv2d


class Network(nn.Module):
    def __init__(self, deformable=True, width=4):
        super().__init__()
        conv_class = DeformConv2d if deformable else nn.Conv2d
        self.backbone = nn.Sequential(conv_class(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)


def save(network, path, leave_out=()):
    weights = {key: value for key, value in network.state_dict().items() if key not in leave_out}
    torch.save({"model": weights}, path)
    return str(path)


def test_loads_what_fits(tmp_path):
    trained, network = Network(), Network()
    nn.init.normal_(trained.backbone[0].conv_offset.weight)
    path = save(trained, tmp_path / "a.pth", ("head.bias", "backbone.1.num_batches_tracked"))
    load_backbone_weights(network, path)
    for one, other in zip(
        trained.backbone.parameters(), network.backbone.parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("saved", "built", "message"),
    [
        (
            Network(deformable=False),
            Network(),
            "it lacks (or has in another shape) backbone.0.conv_offset.weight and 1 more",
        ),
        (
            Network(),
            Network(deformable=False),
            "it also has backbone.0.conv_offset.weight and 1 more",
        ),
        (Network(width=6), Network(), "it lacks (or has in another shape) backbone.0.weight"),
    ],
)
def test_refuses_another_backbone(tmp_path, saved, built, message):
    path = save(saved, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_backbone_weights(built, path)


def test_the_whole_network_or_its_backbone(tmp_path):
    path = save(Network(), tmp_path / "a.pth", ("head.bias",))
    load_backbone_weights(Network(), path)
    with pytest.raises(ConfigError, match=r"it lacks .* head\.bias; take the config"):
        load_weights(Network(), path)


def test_refuses_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty"):
        load_backbone_weights(Network(), "")
    path = tmp_path / "notes.pth"
    path.write_text("no weights")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS: .*notes.pth cannot be read"):
        load_backbone_weights(Network(), str(path))
