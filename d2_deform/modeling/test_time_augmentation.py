"""Testing at several scales and mirrored, for every network of the plugin."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    SemanticSegmentor,
)
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from fvcore.transforms import HFlipTransform, TransformList
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.meta_arch import CategoryAwareRPN

__all__ = [
    "CategoryAwareRPNWithTTA",
    "RCNNWithTTA",
    "SemanticSegmentorWithTTA",
    "build_tta_model",
]

Mapper = Callable[[dict[str, Any]], list[dict[str, Any]]]


def build_tta_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model with test-time augmentation; settings under ``TEST.AUG``.

    Args:
        cfg: of the model.
        model: a :class:`~detectron2.modeling.GeneralizedRCNN` (R-FCN, Faster and Mask R-CNN),
            :class:`~d2_deform.modeling.meta_arch.CategoryAwareRPN` or
            :class:`~detectron2.modeling.SemanticSegmentor`, or one of them in
            ``DistributedDataParallel``.

    Returns:
        A module with the model's inputs and, in evaluation mode, its outputs.

    Raises:
        ValueError: the model is none of those, predicts keypoints, or takes precomputed proposals.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ValueError(
                f"Detectron2's test-time augmentation does not know MODEL.{key}: True; set it or "
                "TEST.AUG.ENABLED to False"
            )
    if isinstance(model, GeneralizedRCNN):
        return RCNNWithTTA(cfg, model)
    if isinstance(model, CategoryAwareRPN):
        return CategoryAwareRPNWithTTA(cfg, model)
    if isinstance(model, SemanticSegmentor):
        return SemanticSegmentorWithTTA(cfg, model)
    raise ValueError(
        f"there is no test-time augmentation for {type(model).__name__} "
        "(MODEL.META_ARCHITECTURE), only for GeneralizedRCNN, CategoryAwareRPN, SemanticSegmentor "
        "and their subclasses; set TEST.AUG.ENABLED to False"
    )


class RCNNWithTTA(GeneralizedRCNNWithTTA):
    """Detectron2's test-time augmentation with one choice of boxes, over the union of all scales.

    Detectron2's own suppresses and cuts to the best 100 at every scale, then does so again for the
    union. Here every scale gives all its boxes above the score threshold. They are brought back to
    the picture, and one ``BoxSelector`` makes the detections of their union: suppression, hard or
    soft, and box voting happen once, and the boxes of all scales vote. So does the official
    release's FPN; the paper does not say how it merged the scales of table 5.

    That holds where the boxes are chosen by a ``BoxSelector`` or by Detectron2's
    ``FastRCNNOutputLayers``. Other heads, should they have a suppression of their own, still apply
    it at every scale.

    One picture is in the network at a time, unless ``batch_size`` is raised.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: GeneralizedRCNN,
        tta_mapper: Mapper | None = None,
        batch_size: int = 1,
    ) -> None:
        """
        Args:
            cfg: for ``TEST`` and ``MODEL.ROI_HEADS``.
            model: the network.
            tta_mapper: makes of a dict with "image" its augmented ones; None:
                :class:`~detectron2.modeling.DatasetMapperTTA` of ``cfg``.
            batch_size: augmented pictures in one run of the network.
        """
        super().__init__(cfg, model, tta_mapper, batch_size)
        self.box_selector = BoxSelector(cfg)

    def _get_augmented_boxes(
        self, augmented_inputs: list[dict[str, Any]], tfms: list[TransformList]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All boxes of all augmented pictures (Tensor[R, 4]), their scores and classes."""
        with self._without_suppression():
            outputs = self._batch_inference(augmented_inputs)
        boxes = [
            torch.from_numpy(tfm.inverse().apply_box(output.pred_boxes.tensor.cpu().numpy()))
            for output, tfm in zip(outputs, tfms, strict=True)
        ]
        scores = torch.cat([output.scores for output in outputs])
        return (
            torch.cat(boxes).to(scores),
            scores,
            torch.cat([output.pred_classes for output in outputs]),
        )

    def _merge_detections(
        self,
        all_boxes: Tensor,
        all_scores: Tensor,
        all_classes: Tensor,
        shape_hw: tuple[int, int],
    ) -> Instances:
        boxes = Boxes(all_boxes)
        boxes.clip(shape_hw)
        union = Instances(shape_hw, pred_boxes=boxes, scores=all_scores, pred_classes=all_classes)
        detections, _ = self.box_selector.select(union)
        return detections[detections.pred_boxes.nonempty()]

    @contextmanager
    def _without_suppression(self) -> Iterator[None]:
        """Lets the model give all its boxes above the score threshold."""
        unlimited = {"nms_thresh": math.inf, "topk_per_image": -1}
        with ExitStack() as stack:
            for module in self.model.modules():
                selector = getattr(module, "box_selector", None)
                changes: dict[str, Any] = {}
                if isinstance(selector, BoxSelector):
                    raw = BoxSelector(score_thresh=selector.score_thresh, **unlimited)
                    changes = {"box_selector": raw}
                elif isinstance(module, FastRCNNOutputLayers):
                    changes = {f"test_{name}": value for name, value in unlimited.items()}
                for name, value in changes.items():
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, value)
            yield


class CategoryAwareRPNWithTTA(RCNNWithTTA):
    """The same for a :class:`~d2_deform.modeling.meta_arch.CategoryAwareRPN`."""

    def __init__(
        self,
        cfg: CfgNode,
        model: CategoryAwareRPN,
        tta_mapper: Mapper | None = None,
        batch_size: int = 1,
    ) -> None:
        """
        Args:
            cfg, model, tta_mapper, batch_size: as :class:`RCNNWithTTA` takes them.
        """
        nn.Module.__init__(self)  # Detectron2's __init__ admits a GeneralizedRCNN alone
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = tta_mapper or DatasetMapperTTA(cfg)
        self.batch_size = batch_size
        self.box_selector = BoxSelector(cfg)

    def _turn_off_roi_heads(self, attrs: list[str]) -> AbstractContextManager[None]:
        del attrs  # it has no RoI heads
        return nullcontext()

    def _batch_inference(
        self, batched_inputs: list[dict[str, Any]], detected_instances: None = None
    ) -> list[Instances]:
        del detected_instances  # nothing is predicted on given boxes
        outputs = []
        for start in range(0, len(batched_inputs), self.batch_size):
            batch = batched_inputs[start : start + self.batch_size]
            outputs.extend(self.model.inference(batch, do_postprocess=False))
        return outputs


class SemanticSegmentorWithTTA(nn.Module):
    """Semantic segmentation as the mean over scales and mirrored pictures.

    Every augmented picture's class scores are resized to the wanted size, as the model does with
    one picture, then turned into probabilities by a softmax, mirrored back and averaged. The paper
    tests DeepLab at one scale; the mean of probabilities is DeepLab's own later practice.
    """

    def __init__(
        self, cfg: CfgNode, model: SemanticSegmentor, tta_mapper: Mapper | None = None
    ) -> None:
        """
        Args:
            cfg: for ``TEST.AUG``.
            model: the network.
            tta_mapper: as :class:`RCNNWithTTA` takes it.
        """
        super().__init__()
        self.model = model
        self.tta_mapper = tta_mapper or DatasetMapperTTA(cfg)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: as the model takes them, with "image" (Tensor[3, H, W] of uint8) on the
                CPU.

        Returns:
            Of every picture "sem_seg" (Tensor[K, "height", "width"]): probabilities of the K
            classes, where the model alone gives logits.
        """
        return [{"sem_seg": self._segment(one)} for one in batched_inputs]

    def _segment(self, picture: dict[str, Any]) -> Tensor:
        height, width = picture["image"].shape[1:]
        augmented_inputs = self.tta_mapper({"height": height, "width": width, **picture})
        total = torch.zeros(())
        for augmented in augmented_inputs:  # one at a time: their scores are large
            transforms = augmented.pop("transforms").transforms
            scores = self.model([augmented])[0]["sem_seg"].softmax(dim=0)
            if any(isinstance(transform, HFlipTransform) for transform in transforms):
                scores = scores.flip(dims=[2])
            total = total + scores
        return total / len(augmented_inputs)
