"""load_config: what it fills in, and what it says of configs that cannot be used."""

import argparse
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from PIL import Image

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine import ConfigError, defaults, load_config, setup


@pytest.fixture(scope="module")
def voc_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc") / "digits"
    write_deformed_digits(str(folder), "val", 3, settings=DeformedDigitsSettings(image_size=64))
    return folder


def test_options_go_over_the_file(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\n")
    cfg = load_config(str(config), ["SOLVER.MAX_ITER", "9"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (9, 0.5)
    assert not cfg.is_frozen()


@pytest.mark.parametrize(
    "gpu_is_there, built, expected",
    [(True, {"cpu", "cuda"}, "cuda"), (True, {"cpu"}, "cpu"), (False, {"cpu"}, "cpu")],
)
def test_device(gpu_is_there, built, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_is_there)
    monkeypatch.setattr(defaults, "built_devices", lambda: frozenset(built))
    assert load_config().MODEL.DEVICE == expected
    assert load_config(use_gpu=False).MODEL.DEVICE == "cpu"
    assert load_config(opts=["MODEL.DEVICE", "meta"]).MODEL.DEVICE == "meta"
    classifier = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.RESNETS.NORM", "BN"]
    classifier += ["MODEL.BACKBONE.NAME", "build_deform_resnet_backbone", "INPUT.MIN_SIZE_TEST"]
    classifier += ["256", "MODEL.RESNETS.OUT_FEATURES", "['res5']", "MODEL.DEFORM.NUM_LAYERS"]
    assert load_config(opts=[*classifier, "3"]).MODEL.DEVICE == expected
    plain = load_config(opts=[*classifier, "0"]).MODEL.DEVICE  # needs none of our operators
    assert plain == ("cuda" if gpu_is_there else "cpu")


def test_several_processes_on_cpu_beside_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(defaults, "built_devices", lambda: frozenset({"cpu"}))
    monkeypatch.setattr(defaults.comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"built for CPU only; hide the GPUs .* CUDA_VISIBLE_DEV"):
        load_config()


def test_voc_folder_gives_data_sets_and_classes(voc_folder, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join("0123456789") + "\n")
    cfg = load_config(
        opts=[
            *("DATASETS.VOC_FOLDER.ROOT", str(voc_folder)),
            *("DATASETS.VOC_FOLDER.CLASSES_FILE", str(classes)),
            *("DATASETS.TRAIN", "('voc_folder_val',)"),
        ]
    )
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    with pytest.raises(ConfigError, match=r"voc_folder_test is registered. The folder has voc_"):
        load_config(
            opts=[
                *("DATASETS.VOC_FOLDER.ROOT", str(voc_folder)),
                *("DATASETS.TEST", "('voc_folder_test',)"),
            ]
        )


@pytest.mark.parametrize("split", ["val", "test"])
def test_voc_folder_is_read(split, voc_folder, tmp_path):
    """A flaw comes to light before training, and only where the split is used."""
    folder = shutil.copytree(voc_folder, tmp_path / "flawed")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("000002\n")
    Image.new("RGB", (9, 9)).save(folder / "JPEGImages" / "000002.jpg")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("000000\n000001\n")
    opts = ["DATASETS.VOC_FOLDER.ROOT", str(folder), "DATASETS.TEST", f"('voc_folder_{split}',)"]
    if split == "val":
        load_config(opts=opts)
    else:
        with pytest.raises(ConfigError, match=r"VOC_FOLDER: .*000002.xml: <size> is 64 x 64"):
            load_config(opts=opts)


def test_voc_folder_without_a_box(voc_folder, tmp_path):
    folder = shutil.copytree(voc_folder, tmp_path / "empty")
    (folder / "Annotations" / "000000.xml").write_text("<annotation></annotation>")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("000000\n")
    with pytest.raises(ConfigError, match="no picture of voc_folder_test has a box"):
        load_config(
            opts=[
                *("DATASETS.VOC_FOLDER.ROOT", str(folder)),
                *("DATASETS.TEST", "('voc_folder_test',)"),
            ]
        )


def test_prediction_needs_no_data(voc_folder):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "DATASETS.TEST", "('voc_folder_val',)"]
    for name in ("voc_folder_val", "voc_folder_test"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    for root in ("", "/nowhere"):
        cfg = load_config(opts=[*opts, "DATASETS.VOC_FOLDER.ROOT", root], with_data=False)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
        assert MetadataCatalog.get("voc_folder_val").get("thing_classes") is None
    cfg = load_config(opts=[*opts, "DATASETS.VOC_FOLDER.ROOT", str(voc_folder)], with_data=False)
    class_names = MetadataCatalog.get("voc_folder_val").thing_classes
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(class_names) > 3


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("MODEL: {DEFORM: {NUM_LAYER: 3}}", r"key MODEL.DEFORM.NUM_LAYER. Did you mean .*LAYERS"),
        ("SOLVER: {MAX_ITER: many}", r"a.yaml: Type mismatch .*SOLVER.MAX_ITER"),
        ("MODEL: [", r"a.yaml: "),
        ("_BASE_: nothing.yaml", r"a.yaml: .*nothing.yaml"),
        ("", r"a.yaml: .* is empty or has no 'KEY: value' lines"),
        ("MODEL:", r"a.yaml: .* is empty or has no 'KEY: value' lines"),
        ("- MODEL", r"a.yaml: .* is empty or has no 'KEY: value' lines"),
    ],
)
def test_flawed_files(yaml, message, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml)
    with pytest.raises(ConfigError, match=message):
        load_config(str(config))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.MAX_ITERS", "3"], "no config key SOLVER.MAX_ITERS. Did you mean SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value"),
        (["SOLVER.MAX_ITER", "many"], "options: SOLVER.MAX_ITER many: Type mismatch"),
        (["DATASETS.TRAIN", "('deformed_digit_train',)"], "Did you mean deformed_digits_train"),
        (["DATASETS.TRAIN", "('voc_folder_x',)"], "Set DATASETS.VOC_FOLDER.ROOT"),
        (["DATASETS.VOC_FOLDER.ROOT", "/nowhere"], "DATASETS.VOC_FOLDER: .*nowhere"),
        (["MODEL.WEIGHTS", "/nowhere.pth"], "MODEL.WEIGHTS: there is no file /nowhere.pth"),
    ],
)
def test_flawed_options(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(opts=opts)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "MODEL.DEFORM.NUM_LAYERS",
            "17",
            r"MODEL.DEFORM.NUM_LAYERS\): 17 given, accepted: 0 to 16",
        ),
        ("MODEL.DEFORM.NUM_GROUPS", "3", r"MODEL.DEFORM.NUM_GROUPS\): 3 given, accepted: the div"),
        ("MODEL.RPN.IN_FEATURES", "['res3']", r"MODEL.RPN.IN_FEATURES is \['res3'\], but the back"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2']", "MODEL.ROI_HEADS.IN_FEATURES is"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "11", "is 11, but deformed_digits_train has 10 classes"),
        ("MODEL.RFCN.SAMPLING_RATIO", "0", "MODEL.RFCN.SAMPLING_RATIO is 0; expected 1 or more"),
        ("SOLVER.OPTIMIZER", "adam", "SOLVER.OPTIMIZER is 'adam'; expected one of SGD, ADAMW"),
    ],
)
def test_unusable_values(key, value, message):
    opts = [
        *("MODEL.META_ARCHITECTURE", "RFCN", "MODEL.ROI_HEADS.IN_FEATURES", "['res5']"),
        *("MODEL.BACKBONE.NAME", "build_deform_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']", "MODEL.ROI_HEADS.NUM_CLASSES", "10"),
        *("DATASETS.TRAIN", "('deformed_digits_train',)"),
    ]
    load_config(opts=opts)
    with pytest.raises(ConfigError, match=message):
        load_config(opts=[*opts, key, value])


def test_builtin_data_that_are_not_on_disk(tmp_path, monkeypatch):
    name = "test_load_config_voc"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_pascal_voc(name, str(tmp_path / "VOC2007"), "train", 2007)
    try:
        with pytest.raises(ConfigError, match=r"should be in .*VOC2007.*DETECTRON2_DATASETS"):
            load_config(opts=["DATASETS.TEST", f"('{name}',)"])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_training_needs_a_data_set(tmp_path):
    args = argparse.Namespace(
        config_file="",
        opts=["OUTPUT_DIR", str(tmp_path)],
        num_gpus=0,
        resume=False,
        eval_only=False,
    )
    with pytest.raises(ConfigError, match=r"DATASETS.TRAIN is empty"):
        setup(args)


def test_weights_of_the_model_zoo_need_no_file():
    load_config(opts=["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere.yaml: there is no such file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    "name, made, says",
    [
        ("voc_2012_sem_seg_train_aug", "VOC2012", r"trainaug.txt is missing.*prepare_voc_aug.py"),
        ("cityscapes_fine_sem_seg_val", "", r"should be in .*leftImg8bit.*DETECTRON2_DATASETS"),
    ],
)
def test_missing_files_of_segmentation_are_told(tmp_path, name, made, says):
    (tmp_path / made).mkdir(exist_ok=True)
    code = (
        "import detectron2.data, d2_deform.engine as e\n"
        f"try: e.load_config(opts=['DATASETS.TEST', str(({name!r},))])\n"
        "except e.ConfigError as error: print(error)"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(says, run.stdout)


CONFIGS = os.path.join(os.path.dirname(defaults.__file__), "..", "configs")


@pytest.mark.parametrize(
    "config, options, says",
    [
        (
            "VOC-Segmentation/deeplab_R_101.yaml",
            ["DATASETS.TRAIN", "('deformed_digits_sem_seg_train',)"],
            r"SEM_SEG_HEAD.NUM_CLASSES is 21, but deformed_digits_sem_seg_train has 11",
        ),
        (
            "VOC-Ablation/category_aware_rpn_R_101.yaml",
            ["DATASETS.TRAIN", "('deformed_digits_train',)"],
            r"ROI_HEADS.NUM_CLASSES is 20, but deformed_digits_train has 10",
        ),
        ("COCO-Detection/rfcn_AIR.yaml", ["MODEL.DEFORM.NUM_LAYERS", "34"], r"34 given.*0 to 33"),
        (
            "VOC-Ablation/rpn_R_101.yaml",
            ["MODEL.RPN.IN_FEATURES", "['res5']"],
            r"RPN.IN_FEATURES is \['res5'\], but the backbone gives \['res4'\]",
        ),
        (
            "COCO-Detection/faster_rcnn_R_101_dconv3_dpool.yaml",
            ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0"],
            r"sampling_ratio: 0 given.*POOLER_SAMPLING_RATIO",
        ),
        (
            "VOC-Segmentation/deeplab_R_101.yaml",
            ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "0"],
            r"SEM_SEG_HEAD.CONVS_DIM is 0; expected 1 or more",
        ),
    ],
)
def test_every_networks_values_are_checked(config, options, says):
    data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.WEIGHTS", ""]
    with pytest.raises(ConfigError, match=says):
        load_config(os.path.join(CONFIGS, config), data + options)


@pytest.mark.parametrize(
    "config, options, says",
    [
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN.yaml",
            ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "TEST.SOFT_NMS.ENABLED", "True"],
            r"TEST.SOFT_NMS.ENABLED is True, but .*StandardROIHeads\) would not obey",
        ),
        (
            "VOC-Segmentation/deeplab_R_101.yaml",
            ["TEST.BOX_VOTING.ENABLED", "True"],
            r"TEST.BOX_VOTING.ENABLED is True, but SemanticSegmentor",
        ),
        (
            "VOC-Ablation/rpn_R_101.yaml",
            ["TEST.AUG.ENABLED", "True"],
            r"no test-time augmentation for ProposalNetwork",
        ),
    ],
)
def test_a_test_that_would_fail_after_training_is_told_before(config, options, says):
    test_every_networks_values_are_checked(config, options, says)


@pytest.mark.parametrize("freeze_at, norm, warns", [(2, "BN", 1), (0, "FrozenBN", 1), (0, "BN", 0)])
def test_random_frozen_layers_are_warned_of(voc_folder, tmp_path, caplog, freeze_at, norm, warns):
    args = argparse.Namespace(
        config_file=os.path.join(CONFIGS, "VOC-Folder/rfcn_thin_R_50_dconv3_dpool.yaml"),
        opts=[
            *("DATASETS.VOC_FOLDER.ROOT", str(voc_folder), "DATASETS.TRAIN", "('voc_folder_val',)"),
            *("DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)),
            *("MODEL.BACKBONE.FREEZE_AT", str(freeze_at), "MODEL.RESNETS.NORM", norm),
        ],
        num_gpus=0,
        eval_only=False,
        resume=False,
    )
    with caplog.at_level("WARNING", logger="d2_deform.engine.defaults"):
        setup(args)
    assert len([r for r in caplog.records if "starts at random" in r.getMessage()]) == warns
