"""Meta-architectures, registered in Detectron2's ``META_ARCH_REGISTRY``."""

from .rfcn import RFCN

__all__ = ["RFCN"]
