"""The trained weights that come with the package: small files, each named after its config."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "find_trained", "pack_trained"]

WEIGHTS = Path(__file__).parent / "weights"
_DIGITS = 8  # of the file's md5 sum, as many as torch.hub has in its names


def find_trained(config_path: str, folder: Path = WEIGHTS) -> Path | None:
    """The weights of a config, if they are there.

    Args:
        config_path: of a config in the zoo, relative to ``configs/``.
        folder: where they lie, as ``configs/`` is laid out.

    Raises:
        RuntimeError: the file is not the one that its name promises.
    """
    stem = config_path.rpartition(".")[0]
    found = sorted(folder.glob(f"{stem}_{'[0-9a-f]' * _DIGITS}.pth"))
    if not found:
        return None
    path = found[-1]
    if not path.stem.endswith(_digest(path.read_bytes())):
        raise RuntimeError(
            f"{path} is damaged: its md5 sum is not the one in its name; install d2_deform again."
        )
    return path


def pack_trained(
    weights: Mapping[str, Tensor], config_path: str, folder: Path
) -> tuple[Path, bytes]:
    """What :func:`find_trained` finds: the weights alone, as small as they stay right.

    Matrices and kernels become float16, offset layers' too: 11 bits of an offset of 8 cells are
    steps of 1/256 of a cell. Vectors (biases, batch norms and their statistics, which may exceed
    float16's range) are few and stay as they are, and so do counters.

    Args:
        weights: a network's ``state_dict()``, without an optimizer's state.
        config_path: of the config that builds the network, relative to ``configs/``.
        folder: the file's, or the one above it for a config in a folder.

    Returns:
        Where the file belongs and its content, which ``DetectionCheckpointer`` reads. Equal weights
        give an equal file.
    """
    small = {
        name: value.detach().cpu().half()
        if value.is_floating_point() and value.dim() > 1
        else value
        for name, value in weights.items()
    }
    buffer = io.BytesIO()
    torch.save({"model": small, "__author__": "d2_deform"}, buffer)
    content = buffer.getvalue()
    stem = config_path.rpartition(".")[0]
    return folder / f"{stem}_{_digest(content)}.pth", content


def _digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()[:_DIGITS]
