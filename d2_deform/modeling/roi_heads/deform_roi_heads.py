"""Faster R-CNN's heads with deformable RoI pooling."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads, build_box_head
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2_deform.modeling.new_layers import build_conv_new

from .box_branch import BoxBranch, find_input_shapes
from .deform_roi_pooler import DeformROIPooler
from .output_layers import BoxOutputLayers

RIGID_POOLER_TYPES = ("ROIPool", "ROIAlignV2", "ROIAlign")

__all__ = ["DeformROIHeads"]


@ROI_HEADS_REGISTRY.register()
class DeformROIHeads(BoxBranch, StandardROIHeads):
    """Detectron2's ``StandardROIHeads``, lighter and with deformable RoI pooling (paper 2.2, 3).

    Two things differ, both in the box branch; masks and keypoints are Detectron2's:

    - ``conv_new``, a 1x1 convolution + ReLU to 256 channels before the pooling, which makes the
      head on a ResNet's last map a light one. With FPN there is none.
    - MODEL.ROI_BOX_HEAD.POOLER_TYPE may also be "DeformRoIPool",
      :class:`~d2_deform.modeling.roi_heads.DeformROIPooler`. The paper's plain Faster R-CNN takes
      the maximum in each bin, "ROIPool"; deformable pooling averages bilinear samples, so it
      differs in both from the plain row. "ROIAlignV2" with the same POOLER_SAMPLING_RATIO averages
      the same samples without moving them.
    """

    @configurable
    def __init__(self, *, conv_new: nn.Module | None = None, **kwargs: Any) -> None:
        """
        Args:
            conv_new: on the map that the box head pools from; None: the map as it is.
            **kwargs: see :class:`BoxBranch` and
                :class:`detectron2.modeling.roi_heads.StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.conv_new = conv_new

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return super().from_config(cfg, input_shape)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        shapes = find_input_shapes(cfg, input_shape)
        in_channels = {shape.channels for shape in shapes}
        if len(in_channels) > 1:
            raise ValueError(
                "the maps of MODEL.ROI_HEADS.IN_FEATURES share one box head, but have "
                f"{[shape.channels for shape in shapes]} channels; name one map, or an FPN's"
            )
        (channels,) = in_channels
        conv_new = None
        if cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM > 0:
            if len(shapes) > 1:
                raise ValueError(
                    "MODEL.DEFORM_ROI_HEADS.CONV_DIM is for a backbone's single map; set it to 0 "
                    f"for the {len(shapes)} maps of MODEL.ROI_HEADS.IN_FEATURES"
                )
            conv_new = build_conv_new(channels, cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM)
            channels = cfg.MODEL.DEFORM_ROI_HEADS.CONV_DIM
        resolution = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        box_head = build_box_head(cfg, ShapeSpec(channels, height=resolution, width=resolution))
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "conv_new": conv_new,
            "box_pooler": _build_box_pooler(cfg, channels, [1.0 / one.stride for one in shapes]),
            "box_head": box_head,
            "box_predictor": BoxOutputLayers(cfg, box_head.output_shape),
        }

    def compute_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        maps = [features[name] for name in self.box_in_features]
        return maps if self.conv_new is None else [self.conv_new(one) for one in maps]

    def predict_on_maps(self, maps: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_pooler(maps, boxes)))


def _build_box_pooler(cfg: CfgNode, in_channels: int, scales: list[float]) -> ROIPooler:
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.POOLER_TYPE == "DeformRoIPool":
        return DeformROIPooler(
            head.POOLER_RESOLUTION,
            scales,
            head.POOLER_SAMPLING_RATIO,
            in_channels,
            gamma=cfg.MODEL.DEFORM_ROI_HEADS.GAMMA,
            aligned=cfg.MODEL.DEFORM_ROI_HEADS.ALIGNED,
            offset_fc_dims=cfg.MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS,
        )
    if head.POOLER_TYPE not in RIGID_POOLER_TYPES:
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {head.POOLER_TYPE!r}, accepted are "
            f"'DeformRoIPool', {', '.join(map(repr, RIGID_POOLER_TYPES))}"
        )
    return ROIPooler(head.POOLER_RESOLUTION, scales, head.POOLER_SAMPLING_RATIO, head.POOLER_TYPE)
