"""The R-FCN detector."""

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

__all__ = ["RFCN"]


@META_ARCH_REGISTRY.register()
class RFCN(GeneralizedRCNN):
    """Region-based fully convolutional network: proposals from res4, all else on res5.

    A :class:`~detectron2.modeling.GeneralizedRCNN` in every respect, so that Detectron2's tools and
    ``GeneralizedRCNNWithTTA`` accept it. What makes it R-FCN is its parts: a backbone whose res5
    keeps stride 16, an RPN on res4, and :class:`~d2_deform.modeling.roi_heads.RFCNROIHeads`, in
    which nothing but a pooling and an average is computed per RoI. ``configs/Base-RFCN.yaml`` puts
    them together.
    """
