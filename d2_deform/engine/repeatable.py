"""What makes a resumed run the same as one without a break."""

from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from d2_deform.data.random_state import STEPS, seed_generators

__all__ = ["RecentScalars", "SeedEachStep"]

_WINDOW = 20  # iterations; Detectron2's writers take the median of so many


class SeedEachStep(HookBase):
    """Seeds every iteration by the run's seed, the process and the iteration.

    So the random choices of an iteration (which anchors and RoIs are sampled, ...) do not depend on
    what ran before it in the same process, and nothing of a generator's state need be kept.
    """

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: 0 or more.
        """
        self._seed = seed

    def before_step(self) -> None:
        seed_generators(self._seed, STEPS, comm.get_rank(), self.trainer.iter)


class RecentScalars(HookBase):
    """Keeps the last iterations' losses in the checkpoint.

    Detectron2 writes the median of the last 20 iterations; without the values from before a break
    the first lines after it would differ from those of an unbroken run. Its place is before the
    checkpointing hook.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[float, int]]] = {}

    def before_train(self) -> None:
        for name, values in self._kept.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, cur_iter=iteration)

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # not trained yet
            return {"scalars": self._kept}
        kept = {}
        for name, is_smoothed in storage.smoothing_hints().items():
            values = storage.history(name).values()
            # What is written as it is, such as results of an evaluation, is in the file already;
            # seconds are not measured in the first iterations of a process.
            is_loss = is_smoothed and not name.endswith("time")
            if is_loss and values and values[-1][1] == self.trainer.iter:
                kept[name] = [pair for pair in values if pair[1] > self.trainer.iter - _WINDOW]
        return {"scalars": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["scalars"]
