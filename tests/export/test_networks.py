"""Exported networks before they become files: what the networks themselves say."""

import pytest
import torch
from detectron2.modeling import build_model
from small_networks import CONFIGS, NETWORKS, TINY, build, picture, predict

from d2_deform.engine import load_config
from d2_deform.export import build_exported

TWO_ROUNDS = ("TEST.BOX_VOTING.ENABLED", "True", "TEST.BOX_VOTING.NUM_ROUNDS", "2")
CASES = {name: (name, ()) for name in NETWORKS} | {
    "rounds and votes": ("rfcn", TWO_ROUNDS),
    "boxes by class": ("rfcn", (*TWO_ROUNDS, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False")),
    "max pooling": ("faster_rcnn", ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool")),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_the_network_says(case):
    name, opts = CASES[case]
    _, model = build(name, *opts)
    network = build_exported(model)
    for size in ((96, 128), (75, 90)):
        image = picture(*size)
        expected = predict(model, image)
        with torch.no_grad():
            given = network(image)
        assert len(given) == len(network.output_names)
        for value, wanted in zip(given, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4)
        assert len(given[0]) > 2


def test_a_backbone_alone():
    _, model = build("fpn")
    network = build_exported(model, backbone_only=True)
    assert network.output_names == ("p2", "p3", "p4", "p5", "p6")
    with torch.no_grad():
        maps = network(picture(70, 100))
    assert [tuple(x.shape[2:]) for x in maps] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]


@pytest.mark.parametrize(
    "name, opts, message",
    [
        ("rfcn", ("TEST.SOFT_NMS.ENABLED", "True"), r"TEST\.SOFT_NMS\.ENABLED: .* set it to False"),
        ("faster_rcnn", ("MODEL.MASK_ON", "True"), r"MODEL\.MASK_ON is True"),
        (
            "rfcn",
            ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
            r"MODEL\.PROPOSAL_GENERATOR\.NAME: .* with its RPN, and this one has none",
        ),
        (
            "rfcn",
            ("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
            r"MODEL\.META_ARCHITECTURE: ProposalNetwork cannot be exported",
        ),
        (
            "faster_rcnn",
            (
                "MODEL.ROI_HEADS.NAME",
                "StandardROIHeads",
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
                "ROIPool",
            ),
            r"MODEL\.ROI_HEADS\.NAME: StandardROIHeads cannot be exported",
        ),
    ],
)
def test_says_what_cannot_be_exported(name, opts, message):
    config, own = NETWORKS[name]
    model = build_model(load_config(f"{CONFIGS}/{config}", [*TINY, *own, *opts], with_data=False))
    with pytest.raises(ValueError, match=message):
        build_exported(model.eval())
