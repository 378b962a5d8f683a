"""The networks; importing this package registers them in Detectron2."""

from d2_deform.modeling import backbone, meta_arch, roi_heads, sem_seg

__all__ = ["backbone", "meta_arch", "roi_heads", "sem_seg"]
