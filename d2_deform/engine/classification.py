"""Training of image classifiers, and the file that a detector's backbone starts from."""

import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from d2_deform.data.classification_mapper import ClassificationMapper
from d2_deform.engine.trainer import DeformTrainer

logger = logging.getLogger(__name__)

__all__ = ["ClassificationTrainer", "write_backbone"]


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


def write_backbone(model: nn.Module, path: str) -> None:
    """Writes the weights of a network's backbone to a file for MODEL.WEIGHTS, whole or not at all.

    The names are the backbone's own ("res2.0.conv1.weight"), and the file tells Detectron2's
    checkpointer to match them by their ends, as its zoo's ImageNet weights do: they find their
    place below "backbone." as well as below a feature pyramid's "backbone.bottom_up.".

    Args:
        model: has a child ``backbone``; may be wrapped in ``DistributedDataParallel``.
        path: the file. An older one is replaced once the new one is complete; until then the new
            one is ``path`` + ".tmp".
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    weights = {
        name: value.cpu()
        for name, value in model.get_submodule("backbone").state_dict().items()
        if not name.endswith("num_batches_tracked")  # frozen batch norms have none
    }
    unfinished = path + ".tmp"
    torch.save(
        {"model": weights, "__author__": "d2_deform", "matching_heuristics": True}, unfinished
    )
    os.replace(unfinished, path)
    logger.info("The backbone is in %s; name it as a detector's MODEL.WEIGHTS", path)
