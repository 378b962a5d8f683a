"""Detectron2's predictor, for weights that fit the config and no others."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from d2_deform.engine.weights import load_weights

__all__ = ["build_predictor"]


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Builds a ``DefaultPredictor`` whose network is wholly that of the checkpoint.

    Args:
        cfg: from :func:`~d2_deform.engine.load_config`, MODEL.WEIGHTS set.

    Raises:
        ConfigError: see :func:`~d2_deform.engine.weights.load_weights`.
    """
    untrained = cfg.clone()
    untrained.defrost()
    untrained.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(untrained)
    load_weights(predictor.model, cfg.MODEL.WEIGHTS)
    return predictor
