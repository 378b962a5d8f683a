"""The category-aware RPN: a region proposal network that names the classes, and nothing behind it.

Shape shorthand of this module:

    N: images in the batch        C: foreground classes
    A: anchors of a cell          R: anchors of an image, sum of H * W * A over its feature maps
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.new_layers import build_conv_new, init_new_layer

__all__ = ["CategoryAwareRPN", "CategoryAwareRPNHead"]

IGNORED = -1  # label of an anchor that is not learnt from, as in Detectron2's RPN

Predictions = tuple[list[Tensor], list[Tensor]]  # class logits and box deltas of every feature map


class CategoryAwareRPNHead(nn.Module):
    """Class logits and box deltas of every anchor, by 1x1 convolutions.

    ``conv_new`` 1x1 + ReLU, then ``cls_logits`` and ``bbox_pred`` straight on it. An RPN has a 3x3
    convolution to 512 channels in between. The paper does not say whether this one does; it counts
    as many parameters as DeepLab (table 4), which leaves no room for it.
    """

    @configurable
    def __init__(
        self, *, in_channels: int, num_anchors: int, num_classes: int, conv_dim: int = 1024
    ) -> None:
        """
        Args:
            in_channels: of the feature maps.
            num_anchors: A.
            num_classes: C, without background.
            conv_dim: channels of ``conv_new``.
        """
        super().__init__()
        self.conv_new = build_conv_new(in_channels, conv_dim)
        self.cls_logits = nn.Conv2d(conv_dim, num_anchors * (num_classes + 1), kernel_size=1)
        self.bbox_pred = nn.Conv2d(conv_dim, num_anchors * 4, kernel_size=1)
        for layer in (self.cls_logits, self.bbox_pred):
            init_new_layer(layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        channels = {shape.channels for shape in input_shape}
        num_anchors = set(build_anchor_generator(cfg, input_shape).num_anchors)
        if len(channels) > 1 or len(num_anchors) > 1:
            raise ValueError(
                "CategoryAwareRPN has one head for all feature maps of MODEL.RPN.IN_FEATURES, "
                f"{list(cfg.MODEL.RPN.IN_FEATURES)}: they need the same channels, got "
                f"{sorted(channels)}, and anchors per cell (MODEL.ANCHOR_GENERATOR), got "
                f"{sorted(num_anchors)}"
            )
        return {
            "in_channels": channels.pop(),
            "num_anchors": num_anchors.pop(),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": cfg.MODEL.CATEGORY_AWARE_RPN.CONV_DIM,
        }

    def forward(self, features: list[Tensor]) -> Predictions:
        """
        Args:
            features: feature maps, each Tensor[N, in_channels, H, W].

        Returns:
            Of every map its logits (Tensor[N, A * (C + 1), H, W], channel ``a * (C + 1) + c``,
            background last) and its deltas (Tensor[N, A * 4, H, W]).
        """
        features = [self.conv_new(feature) for feature in features]
        return [self.cls_logits(x) for x in features], [self.bbox_pred(x) for x in features]


@META_ARCH_REGISTRY.register()
class CategoryAwareRPN(DenseDetector):
    """Detector of one stage: an RPN with a (C + 1)-way softmax for its 2-way one (paper section 4).

    "Class-aware RPN" in the paper's tables. Anchors, their matching, the 256 of an image that are
    learnt from and both losses are those of an RPN; an anchor that matches an object takes its
    class. Boxes are class-agnostic. Class order is Detectron2's, **background last** (index C).

    Where the paper is silent: the head (see :class:`CategoryAwareRPNHead`) is on the backbone's
    last map, as for the paper's other networks; one box for all classes, as an RPN has; at test the
    ``pre_nms_topk`` best pairs of an anchor and a class, then non-maximum suppression in each
    class, as for R-FCN.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        anchor_boundary_thresh: float = -1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        loss_cls_weight: float = 1.0,
        loss_box_reg_weight: float = 1.0,
        pre_nms_topk: int = 6000,
        box_selector: BoxSelector,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            backbone: gives the feature maps.
            head: such as :class:`CategoryAwareRPNHead`.
            head_in_features: names of the feature maps that the head reads.
            anchor_generator: anchors of those maps.
            anchor_matcher: labels anchors 1 (object), 0 (background) or -1 (not learnt from) by
                their IoU with objects.
            box2box_transform: between anchors and boxes.
            num_classes: C, without background.
            batch_size_per_image: anchors of an image that are learnt from.
            positive_fraction: share of them, at most, that match an object.
            anchor_boundary_thresh: anchors that leave the picture by more pixels are not learnt
                from; below 0: all are.
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            smooth_l1_beta: where smooth L1 turns from square to linear; 0: L1.
            loss_cls_weight: factor of ``loss_cls``.
            loss_box_reg_weight: factor of ``loss_box_reg``.
            pre_nms_topk: pairs of an anchor and a class, per feature map, that are considered at
                test.
            box_selector: chooses detections among them.
            pixel_mean: of every channel of the image, in ``input_format``.
            pixel_std: the same.
            vis_period: every so many iterations the event storage gets a picture of what is
                detected in a training image; 0: never.
            input_format: channels of the images, "BGR" or "RGB".
        """
        if num_classes < 1:
            raise ValueError(
                "CategoryAwareRPN needs at least one foreground class, got num_classes="
                f"{num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES"
            )
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.anchor_boundary_thresh = anchor_boundary_thresh
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weight = {"loss_cls": loss_cls_weight, "loss_box_reg": loss_box_reg_weight}
        self.pre_nms_topk = pre_nms_topk
        self.box_selector = box_selector
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "CategoryAwareRPN predicts boxes only; unset MODEL.MASK_ON / KEYPOINT_ON"
            )
        backbone = build_backbone(cfg)
        rpn = cfg.MODEL.RPN
        shapes = backbone.output_shape()
        missing = [name for name in rpn.IN_FEATURES if name not in shapes]
        if missing or not rpn.IN_FEATURES:
            raise ValueError(
                f"MODEL.RPN.IN_FEATURES is {list(rpn.IN_FEATURES)}, expected names among the "
                f"backbone's {list(shapes)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        feature_shapes = [shapes[name] for name in rpn.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": CategoryAwareRPNHead(cfg, feature_shapes),
            "head_in_features": rpn.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, feature_shapes),
            "anchor_matcher": Matcher(
                rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True
            ),
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
            "loss_cls_weight": rpn.LOSS_WEIGHT,
            "loss_box_reg_weight": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            "pre_nms_topk": rpn.PRE_NMS_TOPK_TEST,
            "box_selector": BoxSelector(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See :meth:`detectron2.modeling.GeneralizedRCNN.forward`.

        Args:
            batched_inputs: a dict for every image, with "image" (Tensor[3, H, W]) and, in
                training, "instances" with ``gt_boxes`` and ``gt_classes``.

        Returns:
            In training ``loss_cls`` and ``loss_box_reg``; in inference as :meth:`inference`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images, features, predictions = self._predict(batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        losses = self.forward_training(images, features, predictions, gt_instances)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            with torch.no_grad():
                results = self.forward_inference(images, features, predictions)
            self.visualize_training(batched_inputs, results)
        return losses

    def inference(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> list[Any]:
        """
        Args:
            batched_inputs: as in :meth:`forward`; "height" and "width", if there, are the size in
                which boxes are wanted.
            do_postprocess: False leaves them in the pixels of "image".

        Returns:
            Of every image ``{"instances": detections}``, or just its detections (Instances) without
            ``do_postprocess``; they have ``pred_boxes``, ``scores`` and ``pred_classes``.
        """
        assert not self.training, "inference() is for evaluation mode"
        images, features, predictions = self._predict(batched_inputs)
        results = self.forward_inference(images, features, predictions)
        if do_postprocess:
            return GeneralizedRCNN._postprocess(results, batched_inputs, images.image_sizes)
        return results

    def _predict(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[ImageList, list[Tensor], Predictions]:
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        return images, features, self.head(features)

    def _flatten(self, predictions: Predictions) -> list[list[Tensor]]:
        """Of every map Tensor[N, H * W * A, C + 1] and Tensor[N, H * W * A, 4], in float32."""
        flat = self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])
        return [[x.float() for x in maps] for maps in flat]

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Predictions,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """
        Args:
            images: the batch.
            features: the feature maps the head has read.
            predictions: what it returned.
            gt_instances: of every image, ``gt_boxes`` and ``gt_classes``.

        Returns:
            As :meth:`losses`.
        """
        del images
        logits, deltas = self._flatten(predictions)
        anchors = self.anchor_generator(features)
        labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, gt_boxes)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each anchor shall learn.

        Args:
            anchors: of every feature map.
            gt_instances: as in :meth:`forward_training`.

        Returns:
            Of every image the labels (Tensor[R]: 0 to C - 1 a class, C background, -1 not learnt
            from), at most ``batch_size_per_image`` of which are not -1, and the boxes to regress to
            (Tensor[R, 4], without meaning where the label is no class).
        """
        all_anchors = Boxes.cat(anchors)
        labels, matched_gt_boxes = [], []
        for gt in gt_instances:
            matches, match_labels = self.anchor_matcher(pairwise_iou(gt.gt_boxes, all_anchors))
            candidates = torch.full_like(matches, self.num_classes)
            boxes = torch.zeros_like(all_anchors.tensor)
            if len(gt) > 0:
                candidates = torch.where(match_labels == 1, gt.gt_classes[matches], candidates)
                boxes = gt.gt_boxes.tensor[matches]
            candidates[match_labels == -1] = IGNORED
            if self.anchor_boundary_thresh >= 0:
                inside = all_anchors.inside_box(gt.image_size, self.anchor_boundary_thresh)
                candidates[~inside] = IGNORED
            sampled = torch.cat(
                subsample_labels(
                    candidates, self.batch_size_per_image, self.positive_fraction, self.num_classes
                )
            )
            label = torch.full_like(candidates, IGNORED)
            label[sampled] = candidates[sampled]
            labels.append(label)
            matched_gt_boxes.append(boxes)
        return labels, matched_gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        labels: list[Tensor],
        deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """An RPN's losses: sums over the sampled anchors / (N * ``batch_size_per_image``).

        Args:
            anchors: of every feature map.
            logits: of every feature map Tensor[N, H * W * A, C + 1].
            labels: of :meth:`label_and_sample_anchors`.
            deltas: of every feature map Tensor[N, H * W * A, 4].
            gt_boxes: of :meth:`label_and_sample_anchors`.

        Returns:
            ``loss_cls``, the cross entropy of the softmax, and ``loss_box_reg``.
        """
        label = torch.stack(labels)
        valid = label != IGNORED
        positive = valid & (label != self.num_classes)
        sampled_logits, sampled_labels = cat(logits, dim=1)[valid], label[valid]
        self._log(sampled_logits, sampled_labels, num_images=len(labels))
        losses = {
            "loss_cls": F.cross_entropy(sampled_logits, sampled_labels, reduction="sum"),
            "loss_box_reg": _dense_box_regression_loss(
                anchors,
                self.box2box_transform,
                deltas,
                gt_boxes,
                positive,
                box_reg_loss_type=self.box_reg_loss_type,
                smooth_l1_beta=self.smooth_l1_beta,
            ),
        }
        normalizer = self.batch_size_per_image * len(labels)
        return {name: self.loss_weight[name] * loss / normalizer for name, loss in losses.items()}

    def _log(self, logits: Tensor, labels: Tensor, num_images: int) -> None:
        """Puts the numbers of sampled anchors per image and their accuracy into the storage."""
        prefix = "category_aware_rpn"
        num_neg = (labels == self.num_classes).sum().item()
        storage = get_event_storage()
        storage.put_scalar(f"{prefix}/num_pos_anchors", (len(labels) - num_neg) / num_images)
        storage.put_scalar(f"{prefix}/num_neg_anchors", num_neg / num_images)
        _log_classification_stats(logits, labels, prefix)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Predictions
    ) -> list[Instances]:
        """
        Args:
            images: the batch.
            features: the feature maps the head has read.
            predictions: what it returned.

        Returns:
            The detections of every image, best first, in its pixels.
        """
        results = []
        for candidates in self.find_candidates(images, features, predictions):
            candidates.pred_boxes.clip(candidates.image_size)
            detections, _ = self.box_selector.select(candidates)
            results.append(detections)
        return results

    def find_candidates(
        self, images: ImageList, features: list[Tensor], predictions: Predictions
    ) -> list[Instances]:
        """The best pairs of an anchor and a class, before any suppression.

        Args:
            images: the batch.
            features: the feature maps the head has read.
            predictions: what it returned.

        Returns:
            Of every image ``pred_boxes`` (not clipped), ``scores`` and ``pred_classes`` of at most
            ``pre_nms_topk`` pairs per feature map, which score above the selector's threshold.
        """
        logits, deltas = self._flatten(predictions)
        scores = [x.softmax(dim=-1)[..., :-1] for x in logits]
        anchors = self.anchor_generator(features)
        return [
            self._decode_multi_level_predictions(
                anchors,
                [x[index] for x in scores],
                [x[index] for x in deltas],
                self.box_selector.score_thresh,
                self.pre_nms_topk,
                image_size,
            )
            for index, image_size in enumerate(images.image_sizes)
        ]
