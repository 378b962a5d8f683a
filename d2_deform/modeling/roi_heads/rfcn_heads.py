"""R-FCN's heads: position-sensitive maps, (deformable) PS-RoI pooling, a vote per RoI.

Shape shorthand of this module:

    N: images in the batch        R: RoIs of all images        C: foreground classes
    P: bins on a side (7)         B: box outputs, 4 if class-agnostic, else 4 * C
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2_deform.layers import DeformPSRoIPool
from d2_deform.modeling.new_layers import build_conv_new, init_new_layer

from .box_branch import BoxBranch, find_input_shapes
from .output_layers import BoxOutputLayers

__all__ = ["RFCNOutputLayers", "RFCNROIHeads"]


class RFCNOutputLayers(BoxOutputLayers):
    """The vote, then Fast R-CNN's losses and inference; it has no parameter of its own.

    R-FCN puts its predictors before the pooling, as convolutions on the whole image, so the two
    linear layers of the parent have no place here.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            **kwargs: as :class:`BoxOutputLayers` takes them, without ``input_shape``;
                ``box2box_transform`` and ``num_classes`` are required.
        """
        super().__init__(ShapeSpec(channels=1), **kwargs)
        del self.cls_score, self.bbox_pred

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:  # type: ignore[override]
        arguments = super().from_config(cfg, ShapeSpec(channels=1))
        del arguments["input_shape"]
        return arguments

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: pooled scores (Tensor[R, C + 1, P, P]) and box deltas (Tensor[R, B, P, P]).

        Returns:
            Their averages over the bins: class logits (Tensor[R, C + 1]), background last, and
            deltas (Tensor[R, B]).
        """
        scores, deltas = x
        return scores.mean(dim=(2, 3)), deltas.mean(dim=(2, 3))


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(BoxBranch):
    """R-FCN with rigid or deformable position-sensitive RoI pooling (paper section 2.2, figure 4).

    On the backbone's last feature map: ``conv_new`` 1x1 + ReLU, then ``cls_score`` 1x1 to
    P * P * (C + 1) and ``bbox_pred`` 1x1 to P * P * B position-sensitive maps. Bin (i, j) of an RoI
    reads only the maps of position (i, j); the average over the bins is the RoI's prediction.
    Deformable pooling moves each bin by an offset learned from ``conv_new``'s output: one per class
    and bin for the scores (the background has its own), one per bin for the box.

    Channel of the maps: ``(c * P + i) * P + j`` with bin row i and column j. Class order is
    Detectron2's: foreground 0 to C - 1, **background last** (index C). The official release has the
    background first, and 8 box outputs of which 4 to 7 are used; its class k is our class k - 1
    (k > 0), its class 0 our class C, in ``cls_score`` as in ``cls_pool.offset_conv``.

    The rigid variant averages bilinear samples of each bin; R-FCN's own PS-RoI pooling averages the
    cells of integer bins.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        spatial_scale: float,
        num_classes: int,
        box_predictor: RFCNOutputLayers,
        conv_dim: int = 1024,
        num_bins: int = 7,
        cls_agnostic_bbox_reg: bool = True,
        deform_pool: bool = True,
        sampling_ratio: int = 4,
        gamma: float = 0.1,
        aligned: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            in_feature: name of the backbone's feature map the maps are predicted from.
            in_channels: its channels.
            spatial_scale: cells of that map per image pixel, 1 / stride.
            num_classes: C, without background.
            box_predictor: vote, losses and inference.
            conv_dim: channels of ``conv_new``.
            num_bins: P.
            cls_agnostic_bbox_reg: one box for all classes (the paper) or one for each.
            deform_pool: learn an offset for every bin; else the pooling is rigid.
            sampling_ratio: samples on a side of each bin.
            gamma: factor of the normalised offsets (paper section 2.2).
            aligned: continuous coordinates as Detectron2's ROIAlignV2; False: as the official
                release, for weights trained with it.
            **kwargs: sampling of proposals, OHEM and rounds of localisation, see
                :class:`BoxBranch` and :class:`detectron2.modeling.ROIHeads`.
        """
        if num_classes < 1:
            raise ValueError(
                f"R-FCN needs at least one foreground class, got num_classes={num_classes}; "
                "set MODEL.ROI_HEADS.NUM_CLASSES"
            )
        super().__init__(num_classes=num_classes, **kwargs)
        self.in_feature = in_feature
        self.box_predictor = box_predictor

        num_boxes = 1 if cls_agnostic_bbox_reg else num_classes
        self.conv_new = build_conv_new(in_channels, conv_dim)
        self.cls_score = nn.Conv2d(conv_dim, num_bins**2 * (num_classes + 1), kernel_size=1)
        self.bbox_pred = nn.Conv2d(conv_dim, num_bins**2 * 4 * num_boxes, kernel_size=1)
        for layer in (self.cls_score, self.bbox_pred):
            init_new_layer(layer)

        def make_pool(offset_groups: int) -> DeformPSRoIPool:
            return DeformPSRoIPool(
                output_size=num_bins,
                group_size=num_bins,
                spatial_scale=spatial_scale,
                sampling_ratio=sampling_ratio,
                gamma=gamma,
                aligned=aligned,
                in_channels=conv_dim if deform_pool else None,
                offset_groups=offset_groups,
            )

        self.cls_pool = make_pool(offset_groups=num_classes + 1)
        self.bbox_pool = make_pool(offset_groups=1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise ValueError("RFCNROIHeads predicts boxes only; unset MODEL.MASK_ON / KEYPOINT_ON")
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(in_features) != 1:
            raise ValueError(
                "RFCNROIHeads reads one feature map; MODEL.ROI_HEADS.IN_FEATURES is "
                f"{list(in_features)}, expected one name such as ['res5']"
            )
        (feature,) = find_input_shapes(cfg, input_shape)
        arguments = super().from_config(cfg)
        arguments.update(
            in_feature=in_features[0],
            in_channels=feature.channels,
            spatial_scale=1.0 / feature.stride,
            box_predictor=RFCNOutputLayers(cfg),
            conv_dim=cfg.MODEL.RFCN.CONV_DIM,
            num_bins=cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
            cls_agnostic_bbox_reg=cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG,
            deform_pool=cfg.MODEL.RFCN.DEFORM_POOL,
            sampling_ratio=cfg.MODEL.RFCN.SAMPLING_RATIO,
            gamma=cfg.MODEL.RFCN.GAMMA,
            aligned=cfg.MODEL.RFCN.ALIGNED,
        )
        return arguments

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :meth:`detectron2.modeling.ROIHeads.forward`.

        Returns:
            In training the proposals learnt from and ``loss_cls``, ``loss_box_reg``; in inference
            the detections and an empty dict.
        """
        del images
        if self.training:
            assert targets is not None, "'targets' argument is required during training"
            proposals = self.label_and_sample_proposals(proposals, targets)
            losses = self._forward_box(features, proposals)
            return proposals, losses
        return self._forward_box(features, proposals), {}

    def compute_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        feature = self.conv_new(features[self.in_feature])
        return [self.cls_score(feature), self.bbox_pred(feature), feature]

    def predict_on_maps(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        return self.predict_on_rois(maps, convert_boxes_to_pooler_format(boxes))

    def predict_on_rois(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`predict_on_maps` with the boxes as the pooling takes them.

        Args:
            maps: what :meth:`compute_maps` returned.
            rois: Tensor[R, 5], image index, x1, y1, x2, y2.
        """
        cls_score, bbox_pred, feature = maps
        scores = self.cls_pool(cls_score, rois, feature)
        deltas = self.bbox_pool(bbox_pred, rois, feature)
        return self.box_predictor((scores, deltas))

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Detectron2's hook for per-box outputs other than boxes; R-FCN has none.

        Args:
            features: as in :meth:`forward`.
            instances: with ``pred_boxes`` and ``pred_classes``.

        Returns:
            The same ``instances``.
        """
        assert not self.training, "forward_with_given_boxes is for inference"
        return instances
