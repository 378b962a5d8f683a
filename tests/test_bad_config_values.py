"""Every config key is given what it cannot be, and says what, and what it takes instead."""

import pytest
from detectron2.config import get_cfg

from d2_deform import add_deform_config
from d2_deform.engine import ConfigError, load_config
from d2_deform.engine.config_values import RANGES, REGISTRIES
from d2_deform.engine.defaults import flatten
from d2_deform.model_zoo import get_config_file

RFCN = "quickstart.yaml"
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_101_dconv3_dpool.yaml"
CLASSIFIER = "ImageNet-Classification/classifier_R_50.yaml"
CATEGORY_AWARE_RPN = "VOC-Ablation/category_aware_rpn_R_101.yaml"

# Config, key, value, what the line holds beside the key
TABLE = [
    (RFCN, "MODEL.DEFORM.NUM_LAYERS", "17", "17 given, accepted: 0 to 16"),
    (RFCN, "MODEL.DEFORM.NUM_LAYERS", "-1", "-1 given, accepted: 0 to 16"),
    (RFCN, "MODEL.DEFORM.NUM_LAYERS_PER_STAGE", "[1]", "for each of res2, res3, res4, res5"),
    (RFCN, "MODEL.DEFORM.NUM_LAYERS_PER_STAGE", "[0, 0, 0, 9]", "at most [4, 4, 4, 4]"),
    (RFCN, "MODEL.DEFORM.NUM_GROUPS", "3", "3 given, accepted: the divisors of 128"),
    (RFCN, "MODEL.DEFORM.OFFSET_DILATION", "-1", "-1 given, accepted: 0 (as the convolution)"),
    (RFCN, "MODEL.RESNETS.RES4_DILATION", "0", "0 given, accepted: 1 or more"),
    (RFCN, "MODEL.RFCN.CONV_DIM", "0", "is 0; expected 1 or more"),
    (RFCN, "MODEL.RFCN.SAMPLING_RATIO", "0", "is 0; expected 1 or more"),
    (RFCN, "MODEL.RFCN.GAMMA", "1e999", "is inf; expected a finite number"),
    (FASTER_RCNN, "MODEL.DEFORM_ROI_HEADS.CONV_DIM", "-1", "is -1; expected 0 or more"),
    (FASTER_RCNN, "MODEL.DEFORM_ROI_HEADS.GAMMA", "-1e999", "is -inf; expected a finite number"),
    (FASTER_RCNN, "MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS", "[0]", "is [0]; expected a list"),
    (RFCN, "MODEL.OHEM.BATCH_SIZE_PER_IMAGE", "0", "0 given, accepted is 1 or more"),
    (CATEGORY_AWARE_RPN, "MODEL.CATEGORY_AWARE_RPN.CONV_DIM", "0", "is 0; expected 1 or more"),
    (CLASSIFIER, "MODEL.IMAGE_CLASSIFIER.IN_FEATURE", "p5", "p5 given, but the backbone gives"),
    (CLASSIFIER, "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", "0", "is 0; expected 1 or more"),
    (CLASSIFIER, "MODEL.IMAGE_CLASSIFIER.LABEL_SMOOTHING", "1.5", "1.5 given, accepted: 0 to 1"),
    (CLASSIFIER, "INPUT.CLASSIFICATION.CROP_SIZE", "0", "0 given, accepted: 1 or more"),
    (CLASSIFIER, "INPUT.CLASSIFICATION.MIN_CROP_AREA", "1.5", "accepted: above 0, at most 1"),
    (RFCN, "TEST.SOFT_NMS.METHOD", "cubic", "'cubic'"),
    (RFCN, "TEST.SOFT_NMS.SIGMA", "0.0", "positive"),
    (RFCN, "TEST.BOX_VOTING.IOU_THRESH", "1.5", "iou_thresh=1.5"),
    (RFCN, "TEST.BOX_VOTING.NUM_ROUNDS", "0", "0 given, accepted is 1 or more"),
    (RFCN, "SOLVER.OPTIMIZER", "adam", "is 'adam'; expected one of SGD, ADAMW"),
    (RFCN, "SOLVER.OFFSET_LR_FACTOR", "many", "is 'many'; expected None, or 0 or more"),
    (RFCN, "SOLVER.ROI_OFFSET_LR_FACTOR", "-1.0", "is -1.0; expected None, or 0 or more"),
    (RFCN, "SOLVER.NEW_CONV_LR_FACTOR", "-1.0", "is -1.0; expected 0 or more"),
    (RFCN, "DATASETS.VOC_FOLDER.ROOT", "/nowhere", "/nowhere"),
    (RFCN, "DATASETS.IMAGE_FOLDER.ROOT", "/nowhere", "/nowhere"),
    # Detectron2's own, whose mistakes would be told late or by a traceback
    (RFCN, "DATALOADER.NUM_WORKERS", "-1", "is -1; expected 0 or more"),
    (RFCN, "DATALOADER.SAMPLER_TRAIN", "Sampler", "is 'Sampler'; expected one of TrainingSampler"),
    (RFCN, "MODEL.BACKBONE.NAME", "build_deform_resnet", "Did you mean build_deform_resnet_backb"),
    (RFCN, "MODEL.META_ARCHITECTURE", "rfcn", "is 'rfcn'; expected one of CategoryAwareRPN"),
    (RFCN, "MODEL.PROPOSAL_GENERATOR.NAME", "RPNN", "Did you mean RPN?"),
    (RFCN, "MODEL.ROI_HEADS.NAME", "RFCNHeads", "Did you mean RFCNROIHeads?"),
    (RFCN, "MODEL.SEM_SEG_HEAD.NAME", "DeepHead", "expected one of"),
    (RFCN, "MODEL.DEVICE", "quantum", "is 'quantum'; expected cpu, cuda"),
    (RFCN, "MODEL.RESNETS.DEPTH", "7", "7 given, accepted: 18, 34, 50, 101 or 152"),
    (RFCN, "MODEL.RESNETS.NORM", "XN", "is 'XN'; expected BN, FrozenBN"),
    (RFCN, "SEED", "5000000000", "is 5000000000; expected below 2**32"),
    (RFCN, "SOLVER.BASE_LR", "-1.0", "is -1.0; expected 0 or more"),
    (RFCN, "SOLVER.CHECKPOINT_PERIOD", "0", "is 0; expected 1 or more"),
    (RFCN, "SOLVER.IMS_PER_BATCH", "0", "is 0; expected 1 or more"),
    (RFCN, "SOLVER.LR_SCHEDULER_NAME", "Poly", "Poly"),
    (RFCN, "SOLVER.MAX_ITER", "0", "is 0; expected 1 or more"),
    (RFCN, "SOLVER.WARMUP_ITERS", "-1", "is -1; expected 0 or more"),
    (RFCN, "TEST.EVAL_PERIOD", "-1", "is -1; expected 0 or more"),
]

# Keys that have no range of their own, and why
FREE = {
    "DATASETS.VOC_FOLDER.CLASSES_FILE": "read with a folder: tests/data/test_voc_folder.py",
}


def our_keys():
    cfg = get_cfg()
    before = set(flatten(cfg))
    add_deform_config(cfg)
    return {key: value for key, value in flatten(cfg).items() if key not in before}


FLAGS = sorted(key for key, value in our_keys().items() if isinstance(value, bool))


def load(config, *options):
    data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.WEIGHTS", ""]
    for section in ("TEST.SOFT_NMS", "TEST.BOX_VOTING", "MODEL.OHEM"):
        if options[0].startswith(section):  # what is not used is not checked
            data += [f"{section}.ENABLED", "True"]
    if options[0] == "DATASETS.IMAGE_FOLDER.ROOT":
        data[1] = "('image_folder_train',)"
    return load_config(get_config_file(config), [*data, *options], use_gpu=False)


def test_no_key_is_forgotten():
    named = {key for _, key, *_ in TABLE}
    assert our_keys().keys() <= named | set(FLAGS) | FREE.keys()
    assert RANGES.keys() | REGISTRIES.keys() <= named
    assert not named & FREE.keys()


@pytest.mark.parametrize("config, key, value, says", TABLE, ids=[f"{r[1]}-{r[2]}" for r in TABLE])
def test_the_line_names_key_value_and_what_is_accepted(config, key, value, says):
    with pytest.raises(ConfigError) as error:
        load(config, key, value)
    named = key.rpartition(".")[0] if "FOLDER.ROOT" in key else key
    assert named in str(error.value) and says in str(error.value)


@pytest.mark.parametrize("key", FLAGS)
def test_flags_are_true_or_false(key):
    with pytest.raises(ConfigError, match=rf"{key} maybe: Type mismatch .*'bool'.*'str'"):
        load(RFCN, key, "maybe")


def test_a_schedule_is_named_by_its_keys():
    with pytest.raises(ConfigError, match=r"SOLVER.LR_SCHEDULER_NAME, STEPS, .*Poly"):
        load(RFCN, "SOLVER.LR_SCHEDULER_NAME", "Poly")


@pytest.mark.parametrize("words", [["SOLVER.MAX_ITER", "3", "SEED", "-1"], ["SEED", "4294967295"]])
def test_what_is_in_range_is_taken(words):
    load(RFCN, *words)
