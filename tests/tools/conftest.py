"""A tiny data set in a folder, a tiny network for it, and the tools as modules."""

import importlib.util
import os
import sys

import pytest
import torch

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join(REPOSITORY, "configs", "quickstart.yaml")


@pytest.fixture(scope="session")
def tool():
    """Imports tools/<name>.py as a module."""

    def load(name):
        path = os.path.join(REPOSITORY, "tools", f"{name}.py")
        spec = importlib.util.spec_from_file_location(f"tools_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "voc"
    settings = DeformedDigitsSettings(image_size=64, min_height=0.3)
    write_deformed_digits(str(folder), "train", 8, settings=settings)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def tiny(digits):
    """Options for configs/quickstart.yaml."""
    return [
        *("DATASETS.VOC_FOLDER.ROOT", str(digits)),
        *("DATASETS.TRAIN", "('voc_folder_train',)"),
        *("DATASETS.TEST", "('voc_folder_train',)"),
        *("DATALOADER.NUM_WORKERS", "0"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
        *("MODEL.RFCN.CONV_DIM", "8"),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
        *("SOLVER.IMS_PER_BATCH", "2"),
        *("SOLVER.WARMUP_ITERS", "0"),
    ]
