"""Region proposals from res4, as in configs/Base-RPN.yaml."""

from detectron2.config import LazyCall as L
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead

anchor_generator = L(DefaultAnchorGenerator)(
    sizes=[[128, 256, 512]],  # COCO: 64 too, and 12 anchors
    aspect_ratios=[0.5, 1.0, 2.0],
    strides=[16],
    offset=0.5,
)

anchor_matcher = L(Matcher)(
    thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
)

proposal_generator = L(RPN)(
    in_features=["res4"],
    head=L(StandardRPNHead)(in_channels=1024, num_anchors=9, conv_dims=[512]),
    anchor_generator=anchor_generator,
    anchor_matcher=anchor_matcher,
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=(6000, 6000),
    post_nms_topk=(300, 300),
    nms_thresh=0.7,
    anchor_boundary_thresh=0,
    smooth_l1_beta=1 / 9,
)
