"""Detectron2's default trainer, with the plugin's optimizer, evaluators and offset monitor."""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.sem_seg_evaluation import load_image_into_numpy_array
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.utils.data import DataLoader

from d2_deform.data.checked_mapper import CheckedMapper
from d2_deform.data.random_state import ORDER, seed_generators
from d2_deform.data.repeatable_loader import make_repeatable
from d2_deform.engine.checkpointer import WholeCheckpointer
from d2_deform.engine.defaults import ConfigError
from d2_deform.engine.hooks import OffsetMonitor
from d2_deform.engine.loss_guard import LossGuard
from d2_deform.engine.mixed_precision import CPUAMPTrainer
from d2_deform.engine.repeatable import RecentScalars, SeedEachStep
from d2_deform.engine.scaling import scale_to_world_size
from d2_deform.engine.stopping import StopAtSignal
from d2_deform.evaluation import ClassificationEvaluator, ProposalEvaluator, VOCFolderEvaluator
from d2_deform.modeling.test_time_augmentation import build_tta_model
from d2_deform.solver import build_optimizer

logger = logging.getLogger(__name__)

_WORLD_SIZE = "reference_world_size"  # its name in a checkpoint

__all__ = ["DeformTrainer", "build_evaluator"]


class DeformTrainer(DefaultTrainer):
    """Trains, evaluates and resumes as ``DefaultTrainer`` does.

    What it adds: the optimizer of :mod:`d2_deform.solver`, a schedule scaled to the number of
    processes by :func:`~d2_deform.engine.scaling.scale_to_world_size`, an evaluator by the data
    set's type, :class:`~d2_deform.engine.hooks.OffsetMonitor`, checkpoints that are whole or not
    there, an orderly end at SIGTERM, and the names of the pictures whose loss is no number.

    Where SEED is set, a resumed run is that without the break: batches and the random choices of an
    iteration depend on the seed, the iteration and the number of processes alone.
    """

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        """``DefaultTrainer``'s, line by line, but for a model on CPU.

        ``DefaultTrainer`` always names a GPU to DDP, which then refuses a model on CPU, and its
        ``AMPTrainer`` runs on CUDA alone.
        """
        TrainerBase.__init__(self)
        for name in ("detectron2", "d2_deform"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        cfg = scale_to_world_size(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.SEED >= 0:  # samplers draw their own seed, which must be the same after a break
            seed_generators(cfg.SEED, ORDER)
        data_loader = self.build_train_loader(cfg)

        on_cuda = cfg.MODEL.DEVICE.startswith("cuda")
        device_ids = [comm.get_local_rank()] if on_cuda else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        trainer_class: type[SimpleTrainer] = SimpleTrainer
        if cfg.SOLVER.AMP.ENABLED:
            trainer_class = AMPTrainer if on_cuda else CPUAMPTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.loss_guard = LossGuard(model)
        self.checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def state_dict(self) -> dict[str, Any]:
        """As ``DefaultTrainer``'s, with the number of processes that the schedule is scaled to."""
        return {**super().state_dict(), _WORLD_SIZE: self.cfg.SOLVER.REFERENCE_WORLD_SIZE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes.

        Raises:
            ConfigError: the checkpoint's iterations, learning rate and decay are those of another
                number of processes.
        """
        before, now = state_dict.get(_WORLD_SIZE, 0), self.cfg.SOLVER.REFERENCE_WORLD_SIZE
        if before and now and before != now:
            raise ConfigError(
                f"--resume: the run in {self.cfg.OUTPUT_DIR} had {before} process(es), this one "
                f"has {now}, and SOLVER.REFERENCE_WORLD_SIZE gives each its own schedule; resume "
                f"with {before}, or start anew from its weights (MODEL.WEIGHTS) in another "
                "OUTPUT_DIR."
            )
        super().load_state_dict(state_dict)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's, which names a picture that it cannot read."""
        mapper = CheckedMapper(DatasetMapper(cfg, is_train=True))
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Detectron2's, which names a picture that it cannot read."""
        mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    def build_hooks(self) -> list[HookBase | None]:
        """``DefaultTrainer``'s, with ours where they belong among them."""
        hooks = super().build_hooks()
        # Before any hook that runs the model itself (evaluation) or writes the storage.
        hooks[1:1] = [OffsetMonitor(), RecentScalars()]
        if self.cfg.SEED >= 0:
            hooks.insert(0, SeedEachStep(self.cfg.SEED))
        evaluation = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(evaluation, StopAtSignal(self.checkpointer))
        return hooks

    def train(self) -> Any:
        """Trains from ``start_iter`` on.

        Raises:
            NonFiniteLoss: a loss became infinite or NaN.
            SystemExit: at SIGTERM, once the iteration's checkpoint is written.
        """
        if self.cfg.SEED >= 0:
            loader = make_repeatable(self._trainer.data_loader, self.cfg.SEED, self.start_iter)
            self._trainer.data_loader = loader
        return super().train()

    def after_train(self) -> None:
        # Resumed behind its last iteration, Detectron2 counts one more; the evaluation would be
        # written under another iteration than without the break.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:
            raise self.loss_guard.error(self.iter) from error
        self.loss_guard.check(self.iter)  # Detectron2 looks in the first process alone

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluates what a checkpoint would hold, in every process.

        Each process has seen pictures of its own, so that its running statistics of batch norms are
        its own, too; checkpoints have the first process's.
        """
        if comm.get_world_size() > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates with test-time augmentation, settings under TEST.AUG.

        Pictures come in their own size, whatever INPUT.MIN_SIZE_TEST, so that each scale is
        resampled once.

        Returns:
            As ``test``, with "_TTA" behind every task's name.

        Raises:
            ValueError: see :func:`~d2_deform.modeling.test_time_augmentation.build_tta_model`.
        """
        logger.info("Running inference with test-time augmentation ...")
        tta_model = build_tta_model(cfg, model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0
        results = cls.test(cfg, tta_model, evaluators)
        return OrderedDict((f"{task}_TTA", result) for task, result in results.items())


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluators that belong to a data set, by its metadata's ``evaluator_type``.

    Args:
        cfg: for OUTPUT_DIR and MODEL.META_ARCHITECTURE.
        dataset_name: a registered data set.
        output_folder: where evaluators write; None is "inference" in OUTPUT_DIR.

    Raises:
        NotImplementedError: the type is none of those below; the trainer then skips the data set.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")

    def sem_seg_evaluator() -> DatasetEvaluator:
        # Detectron2's default loader asks for copy=False, which numpy 2 refuses where it must copy.
        load = partial(load_image_into_numpy_array, copy=None)
        return SemSegEvaluator(dataset_name, output_dir=output_folder, sem_seg_loading_fn=load)

    def voc_evaluator() -> DatasetEvaluator:
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":  # COCOEvaluator copes with one itself
            return ProposalEvaluator(dataset_name)
        # The same figures as Detectron2's PascalVOCDetectionEvaluator, which gives NaN where a
        # split has no object of some class.
        return VOCFolderEvaluator(dataset_name)

    builders: dict[str, list[Callable[[], DatasetEvaluator]]] = {
        "pascal_voc": [voc_evaluator],
        "voc_folder": [voc_evaluator],
        "image_folder": [ClassificationEvaluator],
        "coco": [lambda: COCOEvaluator(dataset_name, output_dir=output_folder)],
        "lvis": [lambda: LVISEvaluator(dataset_name, output_dir=output_folder)],
        "sem_seg": [sem_seg_evaluator],
        "cityscapes_instance": [lambda: CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": [lambda: CityscapesSemSegEvaluator(dataset_name)],
        "coco_panoptic_seg": [
            sem_seg_evaluator,
            lambda: COCOEvaluator(dataset_name, output_dir=output_folder),
            lambda: COCOPanopticEvaluator(dataset_name, output_folder),
        ],
    }
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in builders:
        raise NotImplementedError(
            f"No evaluator for data set '{dataset_name}' of evaluator_type {evaluator_type!r}; "
            f"known are {', '.join(sorted(builders))}."
        )
    evaluators = [build() for build in builders[evaluator_type]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
