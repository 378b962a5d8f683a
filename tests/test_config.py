"""add_deform_config: its keys, its isolation, its company."""

import pytest
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from d2_deform import add_deform_config

DEFAULTS = {
    "MODEL.DEFORM.NUM_LAYERS": 3,
    "MODEL.DEFORM.NUM_LAYERS_PER_STAGE": [],
    "MODEL.DEFORM.MODULATED": False,
    "MODEL.DEFORM.NUM_GROUPS": 1,
    "MODEL.DEFORM.OFFSET_DILATION": 0,
    "MODEL.DEFORM.STEM_POOL_AT_CORNER": False,
    "MODEL.RESNETS.RES4_DILATION": 1,
    "MODEL.RFCN.CONV_DIM": 1024,
    "MODEL.RFCN.DEFORM_POOL": True,
    "MODEL.RFCN.SAMPLING_RATIO": 4,
    "MODEL.RFCN.GAMMA": 0.1,
    "MODEL.RFCN.ALIGNED": True,
    "MODEL.DEFORM_ROI_HEADS.CONV_DIM": 256,
    "MODEL.DEFORM_ROI_HEADS.GAMMA": 0.1,
    "MODEL.DEFORM_ROI_HEADS.ALIGNED": True,
    "MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS": [],
    "MODEL.OHEM.ENABLED": False,
    "MODEL.OHEM.BATCH_SIZE_PER_IMAGE": 128,
    "MODEL.CATEGORY_AWARE_RPN.CONV_DIM": 1024,
    "MODEL.IMAGE_CLASSIFIER.IN_FEATURE": "res5",
    "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 1000,
    "MODEL.IMAGE_CLASSIFIER.LABEL_SMOOTHING": 0.0,
    "MODEL.IMAGE_CLASSIFIER.ZERO_INIT_RESIDUAL": False,
    "INPUT.CLASSIFICATION.CROP_SIZE": 224,
    "INPUT.CLASSIFICATION.MIN_CROP_AREA": 0.08,
    "TEST.SOFT_NMS.ENABLED": False,
    "TEST.SOFT_NMS.METHOD": "gaussian",
    "TEST.SOFT_NMS.SIGMA": 0.6,
    "TEST.BOX_VOTING.ENABLED": False,
    "TEST.BOX_VOTING.IOU_THRESH": 0.5,
    "TEST.BOX_VOTING.NUM_ROUNDS": 2,
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.OFFSET_LR_FACTOR": None,
    "SOLVER.ROI_OFFSET_LR_FACTOR": None,
    "SOLVER.NEW_CONV_LR_FACTOR": 1.0,
    "SOLVER.SCALE_WEIGHT_DECAY": False,
    "DATASETS.VOC_FOLDER.ROOT": "",
    "DATASETS.VOC_FOLDER.CLASSES_FILE": "",
    "DATASETS.VOC_FOLDER.SKIP_DIFFICULT": False,
    "DATASETS.IMAGE_FOLDER.ROOT": "",
}


def flatten(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def ours(cfg):
    return {key: value for key, value in flatten(cfg) if key in DEFAULTS}


def test_adds_these_keys_and_no_other():
    cfg = get_cfg()
    before = dict(flatten(cfg))
    add_deform_config(cfg)
    after = dict(flatten(cfg))
    assert {key: after[key] for key in after.keys() - before.keys()} == DEFAULTS
    assert {key: after[key] for key in before} == before


def test_global_default_is_left_alone():
    before = dict(flatten(get_cfg()))
    add_deform_config(get_cfg())
    assert dict(flatten(get_cfg())) == before


def test_composes_with_deeplab_in_either_order():
    first, second = get_cfg(), get_cfg()
    add_deform_config(first)
    add_deeplab_config(first)
    add_deeplab_config(second)
    add_deform_config(second)
    assert dict(flatten(first)) == dict(flatten(second))


def test_keeps_a_dilation_set_before():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.RESNETS.RES4_DILATION = 2
    add_deform_config(cfg)
    assert cfg.MODEL.RESNETS.RES4_DILATION == 2


@pytest.mark.parametrize("key", ["SOLVER.OFFSET_LR_FACTOR", "SOLVER.ROI_OFFSET_LR_FACTOR"])
def test_factors_take_a_number_and_none(key):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_list([key, "0.05"])
    assert dict(flatten(cfg))[key] == 0.05
    cfg.merge_from_list([key, "None"])
    assert dict(flatten(cfg))[key] is None


def test_survives_a_yaml_round_trip(tmp_path):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.merge_from_list(["MODEL.DEFORM.NUM_LAYERS", 6, "SOLVER.OPTIMIZER", "ADAMW"])
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    other = get_cfg()
    add_deform_config(other)
    other.merge_from_file(str(path))
    assert ours(other) == ours(cfg) != DEFAULTS
