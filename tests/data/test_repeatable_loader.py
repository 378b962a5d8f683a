"""Batches that depend on the seed and the iteration alone."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from d2_deform.data.random_state import isolated_random_state, seed_generators
from d2_deform.data.repeatable_loader import make_repeatable

RECORDS = [
    {"file_name": str(number), "width": 2 if number % 3 else 1, "height": 1} for number in range(7)
]


def draw(record):
    """A mapper whose random changes come from all three generators."""
    numbers = torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002
    return {**record, "random": numbers}


def build(workers=0, grouped=False, seed=5):
    return build_detection_train_loader(
        list(RECORDS),
        mapper=draw,
        sampler=TrainingSampler(len(RECORDS), seed=seed),
        total_batch_size=2,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
    )


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def names(batches):
    return [[item["file_name"] for item in batch] for batch in batches]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_goes_on_from_any_batch(workers, grouped):
    whole = take(make_repeatable(build(grouped=grouped), seed=1), 9)
    torch.manual_seed(99)  # what happened before in the process does not matter
    rest = take(make_repeatable(build(workers, grouped), seed=1, start=5), 4)
    assert rest == whole[5:]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_is_that_of_detectron2(grouped):
    assert names(take(make_repeatable(build(grouped=grouped), seed=1), 9)) == names(
        take(build(grouped=grouped), 9)
    )


def test_changes_differ_by_position_and_by_seed():
    batches = take(make_repeatable(build(), seed=1), 9)
    drawn = [item["random"] for batch in batches for item in batch]
    assert len(set(drawn)) == len(drawn)
    others = take(make_repeatable(build(), seed=2), 9)
    assert names(others) == names(batches) and others != batches


def test_processes_share_the_order(monkeypatch):
    def of_process(rank, world_size, count):
        for module in (
            "detectron2.utils.comm",
            "detectron2.data.samplers.distributed_sampler.comm",
        ):
            monkeypatch.setattr(f"{module}.get_rank", lambda: rank)
            monkeypatch.setattr(f"{module}.get_world_size", lambda: world_size)
        return take(make_repeatable(build(), seed=1), count)

    alone = [item for batch in of_process(0, 1, 8) for item in batch]
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 1)  # 2 for each process
    for rank in (0, 1):
        assert [item for batch in of_process(rank, 2, 4) for item in batch] == alone[rank::2]


def test_another_loader_is_left_as_it_is(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_deform"), "propagate", True)
    loader = [[RECORDS[0]]]
    assert make_repeatable(loader, seed=1) is loader
    assert "its order begins anew where a run is resumed" in caplog.text


def draw_all():
    return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_random_states_are_set_and_put_back():
    seed_generators(1, 2)
    expected = [draw_all() for _ in range(2)]
    seed_generators(1, 2)
    first = draw_all()
    with isolated_random_state(1, 3):
        inside = draw_all()
    assert [first, draw_all()] == expected
    seed_generators(1, 3)
    assert inside == draw_all() and not set(inside) & set(itertools.chain(*expected))
