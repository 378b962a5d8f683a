"""Semantic segmentation through the trainer: loader, training and mIoU."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from d2_deform.config import add_deform_config
from d2_deform.data import register_deformed_digits
from d2_deform.engine import DeformTrainer

NUM_PICTURES, SIZE = 4, 64


@pytest.fixture
def digits(tmp_path):
    """The name of a small Deformed Digits data set with label maps."""
    name = "test_sem_seg_digits"
    register_deformed_digits(
        name,
        "train",
        NUM_PICTURES,
        cache_dir=str(tmp_path / "cache"),
        evaluator_type="sem_seg",
        image_size=SIZE,
        min_height=0.5,
        min_digits=1,
        max_digits=1,
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def make_cfg(name: str, output_dir: str) -> CfgNode:
    """A thin deformable ResNet-18 at stride 8 with DeepLab's head."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_deform_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES4_DILATION = 2
    cfg.MODEL.RESNETS.RES5_DILATION = 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 11
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.INPUT.MIN_SIZE_TRAIN = (SIZE,)
    cfg.INPUT.MIN_SIZE_TEST = SIZE
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.03
    cfg.SOLVER.MAX_ITER = 60
    cfg.SOLVER.STEPS = (45,)
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SEED = 1
    cfg.OUTPUT_DIR = output_dir
    return cfg


def background_miou(name: str) -> float:
    """What a network that always says background would reach, in percent."""
    labels = [np.array(Image.open(r["sem_seg_file_name"])) for r in DatasetCatalog.get(name)]
    pixels = np.concatenate([label.ravel() for label in labels])
    return 100 * float((pixels == 0).mean()) / len(np.unique(pixels))


def test_trains_and_evaluates(digits, tmp_path):
    torch.manual_seed(1)
    trainer = DeformTrainer(make_cfg(digits, str(tmp_path)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    results = trainer._last_eval_results["sem_seg"]
    assert background_miou(digits) < 30 and results["mIoU"] > 60
    assert {"IoU-background", *(f"IoU-{digit}" for digit in range(10))} <= results.keys()


def test_loader_gives_pictures_with_their_labels(digits, tmp_path):
    cfg = make_cfg(digits, str(tmp_path))
    cfg.INPUT.MIN_SIZE_TRAIN = (2 * SIZE,)
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    records = {record["image_id"]: record for record in DatasetCatalog.get(digits)}
    batch = next(iter(DeformTrainer.build_train_loader(cfg)))
    assert len(batch) == 4
    for picture in batch:
        labels = np.array(Image.open(records[picture["image_id"]]["sem_seg_file_name"]))
        enlarged = labels.repeat(2, axis=0).repeat(2, axis=1)
        found = picture["sem_seg"].numpy()
        assert found.dtype == np.int64 and found.max() > 0
        assert any(np.array_equal(found, side) for side in (enlarged, enlarged[:, ::-1]))
        assert picture["image"].shape == (3, 2 * SIZE, 2 * SIZE)


def test_crop_of_cityscapes_is_not_resized(tmp_path):
    """Detectron2 crops first and resizes then, so the resize must be told the crop's own size."""
    rows, columns = np.mgrid[:1024, :2048]
    Image.fromarray(np.dstack([rows % 256, columns % 256, rows // 256]).astype(np.uint8)).save(
        tmp_path / "picture.png"
    )
    Image.fromarray((columns // 128).astype(np.uint8)).save(tmp_path / "labels.png")
    cfg = get_cfg()
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [768, 1024]
    cfg.INPUT.MIN_SIZE_TRAIN = (768,)
    cfg.INPUT.MAX_SIZE_TRAIN = 1024
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.FORMAT = "RGB"
    mapped = DatasetMapper(cfg, is_train=True)(
        {
            "file_name": str(tmp_path / "picture.png"),
            "sem_seg_file_name": str(tmp_path / "labels.png"),
            "height": 1024,
            "width": 2048,
        }
    )
    red, green, blue = mapped["image"].long()
    assert mapped["image"].shape == (3, 768, 1024) and mapped["sem_seg"].shape == (768, 1024)
    row = red + 256 * blue
    assert (row[1:] - row[:-1] == 1).all()  # every pixel, once
    assert ((green[:, 1:] - green[:, :-1]) % 256 == 1).all()
    assert torch.equal(mapped["sem_seg"] % 2, green // 128)


def test_is_scored_at_the_label_maps_own_resolution(digits, tmp_path):
    cfg = make_cfg(digits, str(tmp_path))
    cfg.INPUT.MIN_SIZE_TEST = SIZE // 2
    DeformTrainer.test(cfg, DeformTrainer.build_model(cfg))
    predictions = json.loads((tmp_path / "inference" / "sem_seg_predictions.json").read_text())
    assert {tuple(found["segmentation"]["size"]) for found in predictions} == {(SIZE, SIZE)}
