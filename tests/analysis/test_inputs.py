"""Pictures, proposals and batch norms for a model without weights and data."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2_deform.analysis import fit_batch_norms, prepare_input, random_picture, read_picture


def test_picture_is_resized_as_at_test():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 60, 100
    assert prepare_input(cfg, random_picture(48, 64))["image"].shape == (3, 60, 80)
    assert prepare_input(cfg, random_picture(48, 96))["image"].shape == (3, 50, 100)
    cfg.INPUT.MIN_SIZE_TEST = 0  # as it is
    assert prepare_input(cfg, random_picture(48, 96))["image"].shape == (3, 48, 96)


@pytest.mark.parametrize("order, channels", [("BGR", [0, 1, 2]), ("RGB", [2, 1, 0])])
def test_channels_are_in_the_configs_order(order, channels):
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = order, 0
    picture = random_picture(4, 6)
    image = prepare_input(cfg, picture)["image"]
    assert image.dtype == torch.float32
    assert np.array_equal(image.permute(1, 2, 0).numpy(), picture[:, :, channels])


def test_random_boxes_stand_for_proposals_of_a_file():
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 7
    cfg.INPUT.MIN_SIZE_TEST = 0
    proposals = prepare_input(cfg, random_picture(48, 96))["proposals"]
    x1, y1, x2, y2 = proposals.proposal_boxes.tensor.T
    assert len(proposals) == 7
    assert (x1 >= 0).all() and (x1 < x2).all() and (x2 <= 96).all()
    assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= 48).all()


def test_reads_a_picture(tmp_path):
    picture = random_picture(4, 6)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    assert np.array_equal(read_picture(str(tmp_path / "a.png")), picture)
    with pytest.raises(ValueError, match=r"b\.png is not there or cannot be read"):
        read_picture(str(tmp_path / "b.png"))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_batch_norms_fit_their_input(norm):
    """The second one meets what the first one, fitted, gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 5, 3), norm(5))
    model.eval()
    x = 1000 * torch.rand(2, 3, 8, 8) + 500
    fit_batch_norms(model, x)
    output = model(x)
    torch.testing.assert_close(output.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    variance = output.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.ones(5), atol=1e-3, rtol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())
