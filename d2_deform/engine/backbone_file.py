"""The file that a detector's backbone starts from."""

import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2_deform.engine.whole_file import open_whole

logger = logging.getLogger(__name__)

__all__ = ["write_backbone"]


def write_backbone(model: nn.Module, path: str) -> None:
    """Writes the weights of a network's backbone to a file for MODEL.WEIGHTS, whole or not at all.

    The names are the backbone's own ("res2.0.conv1.weight"), and the file tells Detectron2's
    checkpointer to match them by their ends, as its zoo's ImageNet weights do: they find their
    place below "backbone." as well as below a feature pyramid's "backbone.bottom_up.".

    Args:
        model: has a child ``backbone``; may be wrapped in ``DistributedDataParallel``.
        path: the file. An older one is replaced once the new one is complete.

    Raises:
        ValueError: the network has no child of that name.
        OSError: the file cannot be written.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ValueError(
            f"model: {type(model).__name__} given, accepted: a network with a child 'backbone'"
        )
    weights = {
        name: value.cpu()
        for name, value in model.get_submodule("backbone").state_dict().items()
        if not name.endswith("num_batches_tracked")  # frozen batch norms have none
    }
    with open_whole(path) as file:
        torch.save({"model": weights, "__author__": "d2_deform", "matching_heuristics": True}, file)
    logger.info("The backbone is in %s; name it as a detector's MODEL.WEIGHTS", path)
