"""A model and something to run it on, where there are neither weights nor a data set."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

__all__ = ["fit_batch_norms", "prepare_input", "random_picture", "read_picture"]


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture of random colours, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_picture(path: str) -> np.ndarray:
    """Reads a picture, uint8 (H, W, 3), BGR.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return read_image(path, format="BGR")
    except OSError as error:
        raise ValueError(f"{path} is not there or cannot be read as a picture.") from error


def prepare_input(cfg: CfgNode, picture: np.ndarray) -> dict[str, Any]:
    """What a model of this config takes for a picture at test.

    Args:
        cfg: INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST and FORMAT are obeyed. Where the config takes
            proposals from a file, DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST random boxes stand for
            them.
        picture: uint8 (H, W, 3), BGR.

    Returns:
        "image" (Tensor[3, H', W']) and perhaps "proposals".
    """
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    resize = T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST).get_transform(picture)
    picture = resize.apply_image(picture)
    if cfg.INPUT.FORMAT == "RGB":
        picture = picture[:, :, ::-1]
    image = torch.as_tensor(np.ascontiguousarray(picture.astype("float32").transpose(2, 0, 1)))
    result: dict[str, Any] = {"image": image}
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        count = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        result["proposals"] = _random_proposals(count, *picture.shape[:2])
    return result


def fit_batch_norms(model: nn.Module, inputs: list[dict[str, Any]]) -> None:
    """Gives every batch norm the mean and variance that it meets on these inputs.

    Random weights need it: as they come, activations grow from block to block, boxes leave the
    picture, and the second stage of a detector has next to nothing to do.

    Args:
        model: in evaluation mode; its ``BatchNorm2d`` and ``FrozenBatchNorm2d`` are changed.
        inputs: as the model takes them.
    """

    def fit(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_(variance)  # type: ignore[operator]

    handles = [
        module.register_forward_pre_hook(fit)
        for module in model.modules()
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d))
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()


def _random_proposals(count: int, height: int, width: int) -> Instances:
    size = torch.tensor([width, height], dtype=torch.float32)
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(0)) * size
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return Instances(
        (height, width), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(count)
    )
