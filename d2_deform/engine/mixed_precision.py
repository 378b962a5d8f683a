"""Training in mixed precision on CPU, where Detectron2's ``AMPTrainer`` refuses."""

import torch
from detectron2.engine import SimpleTrainer

__all__ = ["CPUAMPTrainer"]


class CPUAMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` whose model runs forward under autocast to bfloat16.

    The backward pass follows the types of the forward pass; parameters, their gradients and the
    optimizer stay float32. bfloat16 has float32's range, so the loss needs no scaling and a
    checkpoint holds what ``SimpleTrainer``'s does.
    """

    def run_step(self) -> None:
        self.model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(self.model.forward)
        try:
            super().run_step()
        finally:
            del self.model.forward  # the class's own again
