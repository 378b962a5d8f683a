"""Detectron2's predictor, for weights that fit the config and no others."""

import pickle
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from d2_deform.engine.defaults import ConfigError

__all__ = ["build_predictor"]


class _Checkpointer(DetectionCheckpointer):
    """Keeps what did not fit, where Detectron2 only warns of it."""

    misfits: dict[str, list[str]]

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        shaped = [key for key, *_ in incompatible.incorrect_shapes]
        missing = [key for key in incompatible.missing_keys if key not in shaped]
        self.misfits = {
            "has another shape of": shaped,
            "lacks": [key for key in missing if not key.endswith("num_batches_tracked")],
            "also has": list(incompatible.unexpected_keys),
        }
        return incompatible


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Builds a ``DefaultPredictor`` whose network is wholly that of the checkpoint.

    Detectron2 warns of what a file lacks and goes on with random weights there. Offset branches
    start at zero, so that a deformable network with a plain one's weights would look sound.

    Args:
        cfg: from :func:`~d2_deform.engine.load_config`, MODEL.WEIGHTS set.

    Raises:
        ConfigError: no weights; the file cannot be read, or is another network's.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise ConfigError(
            "MODEL.WEIGHTS is empty, so there is nothing to predict with; "
            "add: --opts MODEL.WEIGHTS path/to/model_final.pth"
        )
    untrained = cfg.clone()
    untrained.defrost()
    untrained.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(untrained)
    checkpointer = _Checkpointer(predictor.model)
    try:
        checkpointer.load(path)
    except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"MODEL.WEIGHTS: {path} cannot be read as weights ({line}).") from error
    for what, keys in checkpointer.misfits.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConfigError(
                f"MODEL.WEIGHTS: {path} does not fit the config: it {what} {keys[0]}{more}; take "
                "the config that it was trained with."
            )
    return predictor
