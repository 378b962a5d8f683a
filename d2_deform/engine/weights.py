"""Trained weights for a network that is to be looked at, all of them or none."""

import pickle
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from d2_deform.engine.defaults import ConfigError

__all__ = ["load_backbone_weights", "load_weights"]

_BACKBONE = "backbone."
# Files of Detectron2's zoo of 2020 also have the mean and deviation, which the config gives.
_NOT_LEARNT = (".num_batches_tracked", "pixel_mean", "pixel_std")


class _Checkpointer(DetectionCheckpointer):
    """Keeps what did not fit, where Detectron2 only warns of it."""

    missing: list[str]
    unexpected: list[str]

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        self.missing = list(incompatible.missing_keys)
        self.unexpected = list(incompatible.unexpected_keys)
        return incompatible


def load_weights(model: nn.Module, path: str, part: str = "") -> None:
    """Loads a checkpoint into a model, and refuses one that does not fit.

    Detectron2 warns of what a file lacks and goes on. Offset branches start at zero, so what is
    measured of a deformable network with a plain one's weights would look sound, and mean nothing.

    Args:
        model: built from the config.
        path: as MODEL.WEIGHTS.
        part: of the model, such as "backbone."; all of it must be there, and no more.

    Raises:
        ConfigError: no path; the file cannot be read, or is another network's.
    """
    if not path:
        raise ConfigError("MODEL.WEIGHTS is empty; name the trained network's file.")
    checkpointer = _Checkpointer(model)
    try:
        checkpointer.load(path)
    except (
        AssertionError,
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        line = str(error).partition(". ")[0].splitlines()[:1]
        reason = line[0] if line else type(error).__name__
        raise ConfigError(f"MODEL.WEIGHTS: {path} cannot be read as weights ({reason}).") from error
    for keys, what in (
        (checkpointer.missing, "lacks (or has in another shape)"),
        (checkpointer.unexpected, "also has"),
    ):
        keys = [key for key in keys if key.startswith(part) and not key.endswith(_NOT_LEARNT)]
        if keys:
            raise ConfigError(
                f"MODEL.WEIGHTS: {path} is another network's: it {what} {keys[0]}"
                + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
                + "; take the config that it was trained with."
            )


def load_backbone_weights(model: nn.Module, path: str) -> None:
    """:func:`load_weights` of the backbone, whatever the file has beside it."""
    load_weights(model, path, _BACKBONE)
