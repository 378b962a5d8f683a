"""Hooks for Detectron2's trainers."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_deform.layers import DeformPSRoIPool, DeformRoIPool, OffsetConv2d

logger = logging.getLogger(__name__)

__all__ = ["OffsetMonitor"]


@dataclass
class _Watched:
    """An offset layer, and what it predicted in the iteration looked at.

    Attributes:
        name: the layer's name in the model.
        layer: whose output is looked at.
        gamma: factor from a pooling layer's output to shares of the RoI; None for a convolution,
            whose offsets are in cells of its input map.
    """

    name: str
    layer: nn.Module
    gamma: float | None
    total: list[Tensor] = field(default_factory=list)
    most: list[Tensor] = field(default_factory=list)
    count: int = 0
    map_size: tuple[int, int] = (0, 0)

    def look(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook: adds one output to the sums, on its device, without waiting for it."""
        offset = output.detach()
        if self.gamma is None:
            assert isinstance(layer, OffsetConv2d)
            offset = layer.split(offset)[0]
            self.map_size = tuple(inputs[0].shape[-2:])
        if offset.numel() == 0:
            return
        offset = offset.abs().float() * (1.0 if self.gamma is None else self.gamma)
        self.total.append(offset.sum())
        self.most.append(offset.max())
        self.count += offset.numel()

    def take(self) -> tuple[float, float] | None:
        """Mean and maximum since the last call; None where nothing was predicted."""
        if self.count == 0:
            return None
        mean = torch.stack(self.total).sum().item() / self.count
        most = torch.stack(self.most).max().item()
        self.total, self.most, self.count = [], [], 0
        return mean, most

    def is_too_large(self, mean: float) -> bool:
        limit = 0.5 if self.gamma is not None else 0.5 * min(self.map_size)
        return not mean <= limit  # a NaN is too large

    def describe(self, mean: float) -> str:
        if self.gamma is not None:
            return (
                f"The offsets of {self.name} have outgrown their RoIs: on average {mean:.2f} of a "
                "RoI's side. Lower SOLVER.ROI_OFFSET_LR_FACTOR."
            )
        height, width = self.map_size
        return (
            f"The offsets of {self.name} have outgrown its map: on average {mean:.1f} cells on a "
            f"map of {height} x {width} cells. Lower SOLVER.OFFSET_LR_FACTOR."
        )


class OffsetMonitor(HookBase):
    """Writes down how far the offset layers move their samples, and warns of run-away ones.

    Every ``period`` iterations ``offset/<layer>/mean`` and ``offset/<layer>/max`` go into the event
    storage, and so into metrics.json and TensorBoard: absolute values, in cells of the map for a
    convolution and in shares of the RoI's side (after gamma) for RoI pooling. A layer whose mean
    exceeds half of the map's shorter side (half of the RoI) gets one warning.

    Nothing is hooked onto the model in the iterations between.
    """

    def __init__(self, period: int = 20) -> None:
        """
        Args:
            period: iterations between two looks, > 0. The trainer's writers have 20.
        """
        if period < 1:
            raise ValueError(f"period: {period} given, accepted is 1 or more")
        self._period = period
        self._watched: list[_Watched] = []
        self._handles: list[Any] = []
        self._warned: set[str] = set()

    def before_train(self) -> None:
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        self._watched = list(_offset_layers(model))

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            self._handles = [
                watched.layer.register_forward_hook(watched.look) for watched in self._watched
            ]

    def after_step(self) -> None:
        if not self._handles:
            return
        self._remove_handles()
        for watched in self._watched:
            values = watched.take()
            if values is None:
                continue
            mean, most = values
            for key, value in (("mean", mean), ("max", most)):
                self.trainer.storage.put_scalar(
                    f"offset/{watched.name}/{key}", value, smoothing_hint=False
                )
            if watched.is_too_large(mean) and watched.name not in self._warned:
                self._warned.add(watched.name)
                if comm.is_main_process():
                    logger.warning(watched.describe(mean))

    def after_train(self) -> None:
        self._remove_handles()

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _offset_layers(model: nn.Module) -> Iterator[_Watched]:
    for name, module in model.named_modules():
        if isinstance(module, OffsetConv2d):
            yield _Watched(name, module, gamma=None)
        elif isinstance(module, DeformPSRoIPool) and module.offset_conv is not None:
            yield _Watched(f"{name}.offset_conv", module.offset_conv, module.gamma)
        elif isinstance(module, DeformRoIPool) and module.offset_fc is not None:
            yield _Watched(f"{name}.offset_fc", module.offset_fc, module.gamma)
