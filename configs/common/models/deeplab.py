"""Plain DeepLab on ResNet-101, as in configs/Base-DeepLab.yaml, for PASCAL VOC's classes.

Deformable: ``model.backbone.num_deform_layers = 3``.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import SemanticSegmentor

from d2_deform.modeling.sem_seg import DeepLabHead

from .dilated_c5 import pixel_mean, pixel_std
from .dilated_c5 import resnet as backbone

backbone.out_features = ["res5"]

model = L(SemanticSegmentor)(
    backbone=backbone,
    sem_seg_head=L(DeepLabHead)(
        in_feature="res5", in_channels=2048, stride=16, num_classes=21, conv_dim=1024
    ),
    pixel_mean=pixel_mean,
    pixel_std=pixel_std,
)
