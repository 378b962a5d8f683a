"""Training, as Detectron2's engine does it, with what deformable networks need on top."""

from d2_deform.engine.defaults import ConfigError, load_config, setup
from d2_deform.engine.hooks import OffsetMonitor
from d2_deform.engine.trainer import DeformTrainer

__all__ = ["ConfigError", "DeformTrainer", "OffsetMonitor", "load_config", "setup"]
