"""build_evaluator: the evaluator that belongs to a data set."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from PIL import Image

from d2_deform.data import register_deformed_digits
from d2_deform.engine import DeformTrainer
from d2_deform.evaluation import VOCFolderEvaluator


@pytest.mark.parametrize(
    "evaluator_type, evaluator", [("pascal_voc", VOCFolderEvaluator), ("coco", COCOEvaluator)]
)
def test_by_type_of_a_data_set_not_yet_made(evaluator_type, evaluator, tmp_path):
    name = f"test_build_evaluator_{evaluator_type}"
    register_deformed_digits(
        name, "val", 2, cache_dir=str(tmp_path / "cache"), evaluator_type=evaluator_type
    )
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    try:
        assert isinstance(DeformTrainer.build_evaluator(cfg, name), evaluator)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_sem_seg_of_perfect_label_maps(tmp_path):
    name = "test_build_evaluator_sem_seg"
    register_deformed_digits(name, "val", 3, cache_dir=str(tmp_path), evaluator_type="sem_seg")
    try:
        evaluator = DeformTrainer.build_evaluator(get_cfg(), name, str(tmp_path))
        assert isinstance(evaluator, SemSegEvaluator)
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            labels = np.array(Image.open(record["sem_seg_file_name"]), dtype=np.int64)
            scores = torch.nn.functional.one_hot(torch.from_numpy(labels), 11).permute(2, 0, 1)
            evaluator.process([record], [{"sem_seg": scores}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_unknown_type():
    with pytest.raises(NotImplementedError, match="'nothing' of evaluator_type None; known are"):
        DeformTrainer.build_evaluator(get_cfg(), "nothing")
    MetadataCatalog.remove("nothing")
