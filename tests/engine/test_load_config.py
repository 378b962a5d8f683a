"""load_config: what it fills in, and what it says of configs that cannot be used."""

import pytest
import torch

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine import ConfigError, load_config


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


def test_device():
    device = load_config().MODEL.DEVICE
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_config(use_gpu=False).MODEL.DEVICE == "cpu"
    assert load_config(opts=["MODEL.DEVICE", "meta"]).MODEL.DEVICE == "meta"


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


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("MODEL: {DEFORM: {NUM_LAYER: 3}}", r"key MODEL.DEFORM.NUM_LAYER. Did you mean .*LAYERS"),
        ("SOLVER: {MAX_ITER: many}", r"a.yaml: Type mismatch .*SOLVER.MAX_ITER"),
        ("MODEL: [", r"a.yaml: "),
        ("_BASE_: nothing.yaml", r"a.yaml: .*nothing.yaml"),
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


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere.yaml: there is no such file"):
        load_config("nowhere.yaml")
