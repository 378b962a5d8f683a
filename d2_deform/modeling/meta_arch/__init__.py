"""Meta-architectures, registered in Detectron2's ``META_ARCH_REGISTRY``."""

from .category_aware_rpn import CategoryAwareRPN, CategoryAwareRPNHead
from .image_classifier import ImageClassifier
from .rfcn import RFCN

__all__ = ["RFCN", "CategoryAwareRPN", "CategoryAwareRPNHead", "ImageClassifier"]
