"""build_evaluator: the evaluator that belongs to a data set."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator

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


def test_sem_seg(tmp_path):
    name = "test_build_evaluator_sem_seg"
    DatasetCatalog.register(name, lambda: [{"file_name": "a", "sem_seg_file_name": "b"}])
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", stuff_classes=["x"], ignore_label=255)
    try:
        evaluator = DeformTrainer.build_evaluator(get_cfg(), name, str(tmp_path))
        assert isinstance(evaluator, SemSegEvaluator)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_unknown_type():
    with pytest.raises(NotImplementedError, match="'nothing' of evaluator_type None; known are"):
        DeformTrainer.build_evaluator(get_cfg(), "nothing")
    MetadataCatalog.remove("nothing")
