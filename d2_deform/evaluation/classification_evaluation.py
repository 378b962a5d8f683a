"""Top-1 and top-5 accuracy of an image classifier."""

from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator"]


class ClassificationEvaluator(DatasetEvaluator):
    """How often the right class is the most probable one, and among the five most probable.

    Results: {"classification": {"top1", "top5"}}, in percent of all pictures of all processes; top5
    only where there are more than five classes.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._ranks: list[int] = []
        self._num_classes = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with "label".
            outputs: with "scores", a Tensor[K].
        """
        for given, output in zip(inputs, outputs, strict=True):
            scores = output["scores"]
            # An equal score counts as better, and so does a NaN: who cannot tell is wrong.
            self._ranks.append(int((~(scores < scores[given["label"]])).sum()))
            self._num_classes = len(scores)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """See the class. None in all processes but the main one."""
        gathered = comm.gather((self._ranks, self._num_classes))
        if not comm.is_main_process():
            return None
        ranks = [rank for part, _ in gathered for rank in part]
        num_classes = max(number for _, number in gathered)
        return {
            "classification": {
                f"top{k}": 100 * sum(rank <= k for rank in ranks) / max(len(ranks), 1)
                for k in (1, 5)
                if k == 1 or num_classes > k
            }
        }
