"""Feature extraction that the paper's networks share: res5 at stride 16 by dilation.

Made deformable by ``model.backbone.num_deform_layers = 3``.
"""

from detectron2.config import LazyCall as L

from d2_deform.modeling.backbone import AlignedInceptionResNet, build_deform_resnet

resnet = L(build_deform_resnet)(
    depth=101,
    num_deform_layers=0,
    res5_dilation=2,
    stride_in_1x1=True,  # as the weights of MSRA
    norm="FrozenBN",
    out_features=["res4", "res5"],
    freeze_at=2,
)

aligned_inception_resnet = L(AlignedInceptionResNet)(
    num_deform_blocks=0,
    res5_dilation=2,
    norm="FrozenBN",
    out_features=["res4", "res5"],
    freeze_at=2,
)

pixel_mean = [103.53, 116.28, 123.675]  # of pictures in BGR order
pixel_std = [1.0, 1.0, 1.0]
