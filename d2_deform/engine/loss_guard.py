"""Names the pictures of an iteration whose loss is no number."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

__all__ = ["LossGuard", "NonFiniteLoss"]


class NonFiniteLoss(FloatingPointError):
    """A loss, or what a network predicts, became infinite or NaN; the message says where."""


class LossGuard:
    """Remembers what a model was given and what it lost last.

    Detectron2 ends a training whose loss is infinite or NaN, but says neither on which pictures
    nor, with several processes, in which of them.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: takes a list of dicts with "file_name" or "image_id"; in training it returns a
                dict of losses.
        """
        self._pictures: list[str] = []
        self._losses: dict[str, Tensor] = {}
        model.register_forward_pre_hook(self._note_input)
        model.register_forward_hook(self._note_output)

    def check(self, iteration: int) -> None:
        """Raises NonFiniteLoss if a loss of this process is infinite or NaN."""
        # Their sum is finite only if all are; a GPU is then waited for once, not for each.
        if self._losses and not torch.isfinite(
            torch.stack([loss.sum() for loss in self._losses.values()]).sum()
        ):
            raise self.error(iteration)

    def error(self, iteration: int) -> NonFiniteLoss:
        """What to raise of this iteration."""
        losses = {name: loss.item() for name, loss in self._losses.items() if loss.numel() == 1}
        shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        rank = f" of process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        return NonFiniteLoss(
            f"iteration {iteration}: a loss or prediction became infinite or NaN; losses{rank}: "
            f"{shown or 'none yet'}; pictures{rank}: {', '.join(self._pictures) or 'unknown'}. "
            "Look at these pictures and their boxes; where they are sound, lower SOLVER.BASE_LR, "
            "or set SOLVER.CLIP_GRADIENTS.ENABLED True."
        )

    def _note_input(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch = inputs[0] if inputs and isinstance(inputs[0], Iterable) else ()
        self._losses = {}
        self._pictures = [
            str(item.get("file_name", item.get("image_id", "?")))
            for item in batch
            if isinstance(item, Mapping)
        ]

    def _note_output(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if model.training and isinstance(output, Mapping):
            self._losses = {name: loss.detach() for name, loss in output.items()}
