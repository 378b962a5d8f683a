"""Plain R-FCN on ResNet-101, as in configs/Base-RFCN.yaml, for PASCAL VOC's classes.

Deformable: ``model.backbone.num_deform_layers = 3`` and ``model.roi_heads.deform_pool = True``.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher

from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.meta_arch import RFCN
from d2_deform.modeling.roi_heads import RFCNOutputLayers, RFCNROIHeads

from .dilated_c5 import pixel_mean, pixel_std
from .dilated_c5 import resnet as backbone
from .rpn import proposal_generator

model = L(RFCN)(
    backbone=backbone,
    proposal_generator=proposal_generator,
    roi_heads=L(RFCNROIHeads)(
        in_feature="res5",
        in_channels=2048,
        spatial_scale=1 / 16,
        num_classes=20,
        conv_dim=1024,
        num_bins=7,
        deform_pool=False,
        batch_size_per_image=128,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1]),
        box_predictor=L(RFCNOutputLayers)(
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
            cls_agnostic_bbox_reg=True,
            smooth_l1_beta=1.0,
            box_selector=L(BoxSelector)(score_thresh=0.001, nms_thresh=0.3, topk_per_image=300),
        ),
    ),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
    input_format="BGR",
)
