"""Weights in a file from elsewhere, read without running what may be in it."""

import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2_deform.engine.defaults import ConfigError

from .mxnet_file import MXNetFileError, read_mxnet_file

__all__ = ["read_source_file"]

# Where checkpoints keep their weights: Detectron2 and timm's training; MMDetection; others
_WEIGHT_KEYS = ("model", "state_dict", "model_state")
# What torch.load says of a pickle's content that it will not run
_MORE_THAN_TENSORS = re.compile("(?i)unsupported (global|class)|unrecognized function|can only")
_WHY = (
    "it is a pickle that holds more than tensors, and to unpickle means to run whatever the file's "
    "author wrote into it"
)


def read_source_file(path: str, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint.

    Args:
        path: an MXNet ``.params`` file, or what ``torch.save`` or ``pickle`` wrote of a dictionary
            of weights, or of one that holds it under "model" or "state_dict".
        trust_pickle: unpickle also what may run code; only for files of known origin.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ConfigError: the file cannot be read; it is a pickle that is not to be trusted; it holds no
            dictionary of weights.
    """
    try:
        if path.endswith(".params"):
            # A copy, since the arrays read are not writable.
            return {name: torch.tensor(array) for name, array in read_mxnet_file(path).items()}
        return _find_weights(_unpickle(path, trust_pickle), path)
    except MXNetFileError as error:
        raise ConfigError(f"--input {error}.") from error
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror or error}.") from error


def _unpickle(path: str, trusted: bool) -> Any:
    plain = path.endswith(".pkl")  # Detectron2's zoo; others are torch.save's
    if plain and not trusted:
        raise _refusal(path)
    try:
        if plain:
            with open(path, "rb") as file:
                return pickle.load(file, encoding="latin1")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a flawed pickle can raise any
        if plain or not _MORE_THAN_TENSORS.search(str(error)):
            raise _no_checkpoint(path, error) from error
        if not trusted:
            raise _refusal(path) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _no_checkpoint(path, error) from error


def _refusal(path: str) -> ConfigError:
    return ConfigError(
        f"--input {path}: {_WHY}. If you know where it comes from, add --trust-pickle."
    )


def _no_checkpoint(path: str, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(f"--input {path}: it cannot be read as a checkpoint ({reason}).")


def _find_weights(loaded: Any, path: str) -> dict[str, Tensor]:
    for key in _WEIGHT_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConfigError(f"--input {path}: it holds a {type(loaded).__name__} and no weights.")
    weights = {}
    for name, value in loaded.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigError(
                f"--input {path}: {name!r} is a {type(value).__name__} and no tensor; expected a "
                f"dictionary of weights, or one that holds it as {', '.join(_WEIGHT_KEYS)}."
            )
        weights[name] = value.detach()
    return weights
