"""d2_deform.model_zoo: configs by name, and what it says of names it does not have."""

from pathlib import Path

import pytest
import torch

from d2_deform import model_zoo
from d2_deform.engine import load_config

RFCN = "VOC-Detection/rfcn_R_101_dconv3_dpool.yaml"


def test_lists_every_network_and_no_base():
    names = model_zoo.list_configs()
    assert RFCN in names
    assert "quickstart.yaml" in names
    assert not any("Base-" in name for name in names)
    assert all(Path(model_zoo.get_config_file(name)).is_file() for name in names)


def test_config_is_that_of_the_file():
    cfg = model_zoo.get_config(RFCN)
    loaded = load_config(model_zoo.get_config_file(RFCN), with_data=False, use_gpu=False)
    loaded.MODEL.DEVICE = cfg.MODEL.DEVICE
    assert cfg == loaded


def test_unknown_name_is_told_with_the_closest():
    with pytest.raises(RuntimeError, match=r"no config of this name.*rfcn_R_101_dconv3_dpool"):
        model_zoo.get_config("VOC-Detection/rfcn_R_101_dconv_dpool.yaml")


def test_weights_that_are_not_published_are_told_with_the_way_to_them():
    with pytest.raises(RuntimeError, match=r"no trained weights.*tools/train_net.py"):
        model_zoo.get(RFCN, trained=True)


def test_get_builds_the_model_in_training_mode():
    model = model_zoo.get("quickstart.yaml", device="cpu")
    assert model.training
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
    assert model.backbone.res5[-1].conv2_offset.out_channels == 18
