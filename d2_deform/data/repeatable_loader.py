"""Training batches that depend on a seed and on the iteration alone."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from d2_deform.data.random_state import PICTURES, isolated_random_state

logger = logging.getLogger(__name__)

__all__ = ["make_repeatable"]

_Place = tuple[int, int]  # position in the order of all processes, index of the record


def make_repeatable(loader: Any, seed: int, start: int = 0) -> Iterable[Any]:
    """The same batches from any iteration on, with any number of workers.

    Detectron2's loader begins its order anew in every process, and a picture's random changes
    depend on which worker reads it and on what it has read before. Here a record's changes depend
    on ``seed`` and on its position in the order, and the batches before ``start`` are passed over
    without a picture being read.

    Args:
        loader: from ``build_detection_train_loader`` and a list of records, grouped by aspect
            ratio or not. Its sampler decides the order, and must begin alike in each run (as with
            ``comm.shared_random_seed()`` after seeding).
        seed: 0 or more.
        start: how many batches have been used.

    Returns:
        A loader of the same records, mapper, batch size and workers; one of another kind, as it is.
    """
    is_grouped = isinstance(loader, AspectRatioGroupedDataset)
    inner = loader.dataset if is_grouped else loader
    source = getattr(inner, "dataset", None)
    if not isinstance(source, ToIterableDataset):
        logger.warning(
            "The training's loader is none that build_detection_train_loader makes of a list of "
            "records, so its order begins anew where a run is resumed."
        )
        return loader
    # Detectron2's mapped data set does not show its records under a public name.
    records = getattr(source.dataset, "_dataset", source.dataset)
    batches = _Batches(
        source.sampler,
        loader.batch_size if is_grouped else inner.batch_size,
        (lambda index: _is_wide(records[index])) if is_grouped else (lambda index: False),
        start,
    )
    return DataLoader(
        _SeededDataset(source.dataset, seed),
        batch_sampler=batches,
        num_workers=inner.num_workers,
        collate_fn=trivial_batch_collator if is_grouped else inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=worker_init_reset_seed,
        prefetch_factor=inner.prefetch_factor,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator(),  # else it takes a number of the training's own
    )


def _is_wide(record: dict[str, Any]) -> bool:
    return record["width"] > record["height"]


class _SeededDataset(Dataset):
    """Maps a record in a random state of its own."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, place: _Place) -> Any:
        position, index = place
        with isolated_random_state(self._seed, PICTURES, position):
            return self._dataset[index]


class _Batches:
    """This process's batches of places, from batch ``start`` on.

    Args:
        sampler: indices of records, without end.
        batch_size: places in a batch.
        group_of: by index; a batch is of one group, as in ``AspectRatioGroupedDataset``.
        start: batches to pass over.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        group_of: Callable[[int], bool],
        start: int,
    ) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._group_of = group_of
        self._start = start

    def __iter__(self) -> Iterator[list[_Place]]:
        return itertools.islice(self._all(), self._start, None)

    def _all(self) -> Iterator[list[_Place]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting: dict[bool, list[_Place]] = {False: [], True: []}
        for count, index in enumerate(self._sampler):
            group = self._group_of(index)
            waiting[group].append((count * world_size + rank, index))
            if len(waiting[group]) == self._batch_size:
                yield waiting[group]
                waiting[group] = []
