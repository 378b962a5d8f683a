"""Training of image classifiers."""

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader

from d2_deform.data.classification_mapper import ClassificationMapper
from d2_deform.engine.backbone_file import write_backbone
from d2_deform.engine.trainer import DeformTrainer

__all__ = ["ClassificationTrainer"]


class ClassificationTrainer(DeformTrainer):
    """:class:`~d2_deform.engine.DeformTrainer` for ``ImageClassifier`` on folders of pictures.

    A finished training leaves OUTPUT_DIR/backbone.pth, see :func:`write_backbone`.
    """

    def train(self) -> Any:
        results = super().train()
        if comm.is_main_process():
            write_backbone(self.model, os.path.join(self.cfg.OUTPUT_DIR, "backbone.pth"))
        return results

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        mapper = ClassificationMapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper, aspect_ratio_grouping=False)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg,
            dataset_name,
            mapper=ClassificationMapper(cfg, is_train=False),
            batch_size=max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
        )
