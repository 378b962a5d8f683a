"""Networks in the form that is exported: one picture in, tensors out.

An exported network shares the modules of the one it is made from. It takes

    image (Tensor[3, H, W] of float32): any size, grey levels 0 to 255, channels in the order of
        INPUT.FORMAT, already resized as the network wants it

and gives a tuple, named by its ``output_names``. Whatever stands in pixels is in pixels of
``image``.
"""

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.export.selection import clip, find_detections, find_proposals, select, top
from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.meta_arch import CategoryAwareRPN, ImageClassifier
from d2_deform.modeling.roi_heads import BoxBranch, RFCNROIHeads

__all__ = [
    "ExportedBackbone",
    "ExportedCategoryAwareRPN",
    "ExportedClassifier",
    "ExportedNetwork",
    "ExportedRCNN",
    "ExportedSegmentor",
    "build_exported",
]


class ExportedNetwork(nn.Module):
    """What all of them share: the normalised, padded picture and the backbone's maps."""

    model: Any  # Detectron2's classes are not typed
    output_names: tuple[str, ...]

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: with ``backbone``, ``pixel_mean`` and ``pixel_std``; in evaluation mode.
        """
        super().__init__()
        self.model = model

    def compute_features(self, image: Tensor) -> dict[str, Tensor]:
        """The backbone's maps (Tensor[1, C, h, w]) of ``image`` (Tensor[3, H, W])."""
        x = (image - self.model.pixel_mean) / self.model.pixel_std
        divisor = self.model.backbone.size_divisibility
        if divisor > 1:
            height, width = image.shape[1:]
            bottom = (height + divisor - 1) // divisor * divisor - height
            right = (width + divisor - 1) // divisor * divisor - width
            x = F.pad(x, (0, right, 0, bottom))
        return self.model.backbone(x[None])


class ExportedBackbone(ExportedNetwork):
    """A backbone alone; its outputs are its feature maps, Tensor[1, C, h, w] each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.output_names = tuple(self.model.backbone.output_shape())

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.compute_features(image)
        return tuple(features[name] for name in self.output_names)


class ExportedClassifier(ExportedNetwork):
    """``scores`` (Tensor[K]): the probability of each class."""

    output_names = ("scores",)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        feature = self.compute_features(image)[self.model.in_feature]
        return (self.model.linear(feature.mean(dim=(2, 3))).softmax(dim=1)[0],)


class ExportedSegmentor(ExportedNetwork):
    """``sem_seg`` (Tensor[K, H, W]): the logit of each class in each pixel of ``image``."""

    output_names = ("sem_seg",)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        logits, _ = self.model.sem_seg_head(self.compute_features(image))
        # As [..., :H, :W]; of that torch.export would keep whether it cuts anything off.
        for axis in (2, 3):
            kept = torch.arange(image.shape[axis - 1], device=image.device)
            logits = logits.index_select(axis, kept)
        return (logits[0],)


class ExportedDetector(ExportedNetwork):
    """What is detected, best first.

    - ``boxes`` (Tensor[D, 4]): x1, y1, x2, y2 in pixels of ``image``, inside it
    - ``scores`` (Tensor[D])
    - ``classes`` (Tensor[D] of int64): 0 to K - 1

    D may be 0.
    """

    output_names = ("boxes", "scores", "classes")


class ExportedRCNN(ExportedDetector):
    """R-FCN, or Faster R-CNN with this package's heads."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[1:]
        size = (height, width)
        heads = self.model.roi_heads
        features = self.compute_features(image)
        boxes = self._propose(features, size)
        maps = heads.compute_maps(features)
        rounds: list[tuple[Tensor, Tensor]] = []
        for number in range(heads.num_rounds):
            if number > 0:
                boxes = _next_round(rounds[-1], size)
            rois = torch.cat([boxes.new_zeros(boxes.shape[0], 1), boxes], dim=1)
            logits, deltas = self._predict(maps, rois)
            predictor = heads.box_predictor
            scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=-1)
            rounds.append((predictor.box2box_transform.apply_deltas(deltas, boxes), scores))
        all_boxes, all_scores = (torch.cat(of_rounds) for of_rounds in zip(*rounds, strict=True))
        return find_detections(all_boxes, all_scores, size, predictor.box_selector)

    def _predict(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        if isinstance(heads, RFCNROIHeads):
            return heads.predict_on_rois(maps, rois)
        return heads.box_predictor(heads.box_head(_pool(heads.box_pooler, maps, rois)))

    def _propose(self, features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        anchors = [of_map.tensor for of_map in rpn.anchor_generator(maps)]
        return find_proposals(
            [
                rpn.box2box_transform.apply_deltas(_by_anchor(of_map, 4), its_anchors)
                for of_map, its_anchors in zip(deltas, anchors, strict=True)
            ],
            [_by_anchor(of_map, 1)[:, 0] for of_map in logits],
            size,
            nms_thresh=rpn.nms_thresh,
            pre_nms_topk=rpn.pre_nms_topk[False],
            post_nms_topk=rpn.post_nms_topk[False],
            min_size=rpn.min_box_size,
        )[0]


class ExportedCategoryAwareRPN(ExportedDetector):
    """The category-aware RPN."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        height, width = image.shape[1:]
        features = self.compute_features(image)
        maps = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(maps)
        boxes, scores, classes = [], [], []
        for its_logits, its_deltas, anchors in zip(
            logits, deltas, model.anchor_generator(maps), strict=True
        ):
            probabilities = _by_anchor(its_logits, model.num_classes + 1).softmax(dim=-1)[:, :-1]
            best, pair = top(probabilities.flatten(), model.pre_nms_topk)
            above = (best > model.box_selector.score_thresh).nonzero()[:, 0]
            best, pair = best[above], pair[above]
            anchor = pair // model.num_classes
            boxes.append(
                model.box2box_transform.apply_deltas(
                    _by_anchor(its_deltas, 4)[anchor], anchors.tensor[anchor]
                )
            )
            scores.append(best)
            classes.append(pair % model.num_classes)
        return select(
            clip(torch.cat(boxes), (height, width)),
            torch.cat(scores),
            torch.cat(classes),
            model.box_selector,
        )


def build_exported(model: nn.Module, backbone_only: bool = False) -> ExportedNetwork:
    """The exported form of a network.

    Args:
        model: in evaluation mode.
        backbone_only: its backbone alone.

    Raises:
        ValueError: there is none for it; the message says why.
    """
    if backbone_only:
        return ExportedBackbone(model).eval()
    selector = _find_selector(model)
    if selector is not None and selector.soft_nms is not None:
        raise ValueError(
            "TEST.SOFT_NMS.ENABLED: soft-NMS goes through the boxes one by one, which cannot be "
            "exported; set it to False"
        )
    if isinstance(model, SemanticSegmentor):
        return ExportedSegmentor(model).eval()
    if isinstance(model, ImageClassifier):
        return ExportedClassifier(model).eval()
    if isinstance(model, CategoryAwareRPN):
        return ExportedCategoryAwareRPN(model).eval()
    if isinstance(model, GeneralizedRCNN):
        _check_parts(model)
        return ExportedRCNN(model).eval()
    raise ValueError(
        f"MODEL.META_ARCHITECTURE: {type(model).__name__} cannot be exported, but its backbone can"
    )


def _check_parts(model: GeneralizedRCNN) -> None:
    if not isinstance(model.proposal_generator, RPN):
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME: a detector is exported with its RPN, and this one has "
            "none"
        )
    heads = model.roi_heads
    if not isinstance(heads, BoxBranch):
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME: {type(heads).__name__} cannot be exported, accepted are "
            "RFCNROIHeads and DeformROIHeads"
        )
    for key, name in (("MASK_ON", "mask_on"), ("KEYPOINT_ON", "keypoint_on")):
        if getattr(heads, name, False):
            raise ValueError(f"MODEL.{key} is True, but boxes alone are exported; set it to False")


def _find_selector(model: nn.Module) -> BoxSelector | None:
    for module in model.modules():
        selector = getattr(module, "box_selector", None)
        if isinstance(selector, BoxSelector):
            return selector
    return None


def _by_anchor(of_map: Tensor, values: int) -> Tensor:
    """A head's map (Tensor[1, A * values, H, W]) as Tensor[H * W * A, values]."""
    return of_map[0].permute(1, 2, 0).reshape(-1, values).float()


def _pool(pooler: ROIPooler, maps: list[Tensor], rois: Tensor) -> Tensor:
    """``pooler`` on RoIs (Tensor[R, 5]) of one picture in place of lists of boxes."""
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    # As assign_boxes_to_levels of Detectron2, whose Boxes ask whether they are empty
    _, x1, y1, x2, y2 = rois.unbind(1)
    scale = ((x2 - x1) * (y2 - y1)).sqrt() / pooler.canonical_box_size
    level = (pooler.canonical_level + (scale + 1e-8).log2()).floor()
    level = level.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    rows = [(level == number).nonzero()[:, 0] for number in range(len(maps))]
    pooled = [
        pool_level(of_level, rois[its_rows])
        for pool_level, of_level, its_rows in zip(pooler.level_poolers, maps, rows, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(rows).argsort()]


def _next_round(predicted: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """As :mod:`~d2_deform.modeling.roi_heads.iterative_localization` passes on boxes."""
    boxes, scores = predicted
    num_boxes = boxes.shape[1] // 4
    if num_boxes > 1:
        best = scores[:, :-1].argmax(dim=1)
        boxes = boxes.reshape(-1, num_boxes, 4).gather(1, best[:, None, None].expand(-1, 1, 4))
        boxes = boxes[:, 0]
    finite = boxes.isfinite().all(dim=1)
    boxes = clip(boxes, size)
    x1, y1, x2, y2 = boxes.unbind(1)
    return boxes[(finite & (x2 > x1) & (y2 > y1)).nonzero()[:, 0]]
