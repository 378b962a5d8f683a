"""Plain light Faster R-CNN on ResNet-101, as in configs/Base-FasterRCNN.yaml, for PASCAL VOC.

Deformable: ``model.backbone.num_deform_layers = 3`` and
``model.roi_heads.box_pooler = deform_box_pooler``.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from d2_deform.modeling.box_selector import BoxSelector
from d2_deform.modeling.new_layers import build_conv_new
from d2_deform.modeling.roi_heads import BoxOutputLayers, DeformROIHeads, DeformROIPooler

from .dilated_c5 import pixel_mean, pixel_std
from .dilated_c5 import resnet as backbone
from .rpn import proposal_generator

deform_box_pooler = L(DeformROIPooler)(
    output_size=7, scales=(1 / 16,), sampling_ratio=4, in_channels=256
)

model = L(GeneralizedRCNN)(
    backbone=backbone,
    proposal_generator=proposal_generator,
    roi_heads=L(DeformROIHeads)(
        num_classes=20,
        batch_size_per_image=128,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1]),
        conv_new=L(build_conv_new)(in_channels=2048, out_channels=256),
        box_in_features=["res5"],
        box_pooler=L(ROIPooler)(
            output_size=7, scales=(1 / 16,), sampling_ratio=0, pooler_type="ROIPool"
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(BoxOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
            smooth_l1_beta=1.0,
            box_selector=L(BoxSelector)(score_thresh=0.001, nms_thresh=0.3, topk_per_image=300),
        ),
    ),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
    input_format="BGR",
)
