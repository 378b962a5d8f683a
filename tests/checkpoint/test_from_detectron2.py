"""Detectron2's zoo: its "dconv" models load as they are, by Detectron2's own checkpointer."""

import pickle

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from test_from_release import config

from d2_deform.checkpoint import convert, read_source_file
from d2_deform.engine.weights import load_weights

OURS = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_dconv13.yaml"
THEIRS = "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml"
BLOCKS = {"res3": 4, "res4": 6, "res5": 3}


def zoo_shapes(*opts):
    """Shapes by name of a "dconv_c3-c5" model.

    Detectron2's deformable block needs its compiled part, so this is its plain network, and what
    ``DeformBottleneckBlock`` (detectron2/modeling/backbone/resnet.py) has beyond the plain block:
    ``conv2_offset``, 3x3 with bias, 2 channels for each of 9 taps and group, or 3 if modulated.
    """
    cfg = detectron2_zoo.get_config(THEIRS)
    cfg.merge_from_list([*opts, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4])
    with torch.device("meta"):
        network = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    factors = 3 if cfg.MODEL.RESNETS.DEFORM_MODULATED else 2
    channels = factors * 9 * cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS
    for stage, blocks in BLOCKS.items():
        for block in range(blocks):
            name = f"backbone.bottom_up.{stage}.{block}"
            width = shapes[f"{name}.conv2.weight"][0]
            shapes[f"{name}.conv2_offset.weight"] = (channels, width, 3, 3)
            shapes[f"{name}.conv2_offset.bias"] = (channels,)
    return shapes


@pytest.mark.parametrize(
    "name, opts, theirs",
    [
        (OURS, [], []),
        (
            OURS.replace("dconv", "mdconv"),
            ["MODEL.DEFORM.NUM_GROUPS", 2],
            ["MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2],
        ),
    ],
)
def test_names_and_shapes_are_ours(name, opts, theirs):
    with torch.device("meta"):
        cfg = config(name, *opts)
        network = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert ours == zoo_shapes(*theirs)


THIN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 6),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 12, "MODEL.ROI_MASK_HEAD.CONV_DIM", 6),
]


def test_a_file_of_the_zoo_loads_as_it_is_and_converted(tmp_path, caplog):
    """With the buffers that files of 2020 have besides."""
    cfg = config(OURS, *THIN)
    weights = {name: torch.randn(shape) for name, shape in zoo_shapes(*THIN).items()}
    old = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    old |= {
        f"proposal_generator.anchor_generator.cell_anchors.{level}": torch.zeros(3, 4)
        for level in range(5)
    }
    path = str(tmp_path / "model_final_821d0b.pkl")
    arrays = {name: value.numpy() for name, value in (weights | old).items()}
    with open(path, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)

    model = build_model(cfg)
    left = DetectionCheckpointer(model).load(path)
    assert set(left) == {"__author__"}
    assert "not found in the checkpoint" not in caplog.text
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())

    load_weights(model, path)  # as tools/demo.py does, and refuses what does not fit

    account = convert(read_source_file(path, trust_pickle=True), "detectron2", cfg)
    assert account.complete and not account.new, account.lines()
    assert sorted(account.left_out) == sorted(old)
    assert all(torch.equal(account.weights[name], value) for name, value in weights.items())
