"""An orderly end at SIGTERM, which clusters send before they take a machine away."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

__all__ = ["StopAtSignal"]


class StopAtSignal(HookBase):
    """At SIGTERM, writes a checkpoint after the iteration at work and ends the process.

    Several processes ask each other after every iteration and stop at the same one, whichever of
    them got the signal. Workers of the data loader, which often get it too, go on until then. The
    exit status is 143, as of a process that the signal ends by itself. Its place is behind the
    hook that writes checkpoints and before the one that evaluates; a signal during an evaluation
    waits for the end of the iteration behind it.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        """
        Args:
            checkpointer: the trainer's.
        """
        self._checkpointer = checkpointer
        self._is_asked = False
        self._before: Any = None

    def before_train(self) -> None:
        _keep_workers(self.trainer.data_loader)
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def after_step(self) -> None:
        if not any(comm.all_gather(self._is_asked)):
            return
        iteration = self.trainer.iter
        name = f"model_{iteration:07d}"
        # The final iteration's, or one of this very iteration, is there already.
        if comm.is_main_process() and not self._is_saved(name):
            self._checkpointer.save(name, iteration=iteration)
        comm.synchronize()
        logger.warning(
            "Stopped by SIGTERM after iteration %d; --resume goes on from there.", iteration
        )
        raise SystemExit(128 + signal.SIGTERM)

    def _is_saved(self, name: str) -> bool:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            name = "model_final"
        last = self._checkpointer.get_checkpoint_file()
        return os.path.basename(last) == f"{name}.pth"

    def _ask(self, number: int, frame: Any) -> None:
        self._is_asked = True


def _keep_workers(loader: Iterable[Any]) -> None:
    """Has a loader's workers outlive a SIGTERM that does not come from this process."""
    inner = loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader
    if isinstance(inner, DataLoader):
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)


def _start_worker(then: Callable[[int], None] | None, worker_id: int) -> None:
    # A handler is not told the sender, sigwaitinfo is. Threads that start later block it, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
