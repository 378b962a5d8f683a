"""Plain category-aware RPN on ResNet-101, as in configs/Base-CategoryAwareRPN.yaml, for PASCAL VOC.

Deformable: ``model.backbone.num_deform_layers = 3``.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform

from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.meta_arch import CategoryAwareRPN, CategoryAwareRPNHead

from .dilated_c5 import pixel_mean, pixel_std
from .dilated_c5 import resnet as backbone
from .rpn import anchor_generator, anchor_matcher

backbone.out_features = ["res5"]

model = L(CategoryAwareRPN)(
    backbone=backbone,
    head=L(CategoryAwareRPNHead)(
        in_channels=2048, num_anchors=9, num_classes="${..num_classes}", conv_dim=1024
    ),
    head_in_features=["res5"],
    anchor_generator=anchor_generator,
    anchor_matcher=anchor_matcher,
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    num_classes=20,
    batch_size_per_image=256,
    positive_fraction=0.5,
    anchor_boundary_thresh=0,
    smooth_l1_beta=1 / 9,
    pre_nms_topk=6000,
    box_selector=L(BoxSelector)(score_thresh=0.001, nms_thresh=0.3, topk_per_image=300),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
    input_format="BGR",
)
