"""The random number generators of torch, numpy and Python, set together."""

# ruff: noqa: NPY002 - what Detectron2's augmentations draw from

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["ORDER", "PICTURES", "STEPS", "isolated_random_state", "seed_generators"]

# What the random numbers are for: the first number of a key behind the run's seed.
ORDER, PICTURES, STEPS = 0, 1, 2


def seed_generators(*key: int) -> None:
    """Seeds all three, torch's on the CPU and, where CUDA is in use, on every GPU.

    Args:
        key: numbers of 0 or more; another tuple gives an unrelated stream.
    """
    seed = _mix(key)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed takes a millisecond where it is not
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def isolated_random_state(*key: int) -> Iterator[None]:
    """Seeds the three generators of the CPU for a block, and puts them back as they were."""
    state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state(),
        random.getstate(),
    )
    seed = _mix(key)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _mix(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])  # 32 bits: numpy takes no more
