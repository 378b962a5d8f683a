"""Memory, file handles and threads of a process over a long run (Linux)."""

import ctypes
import math
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Usage", "growth", "read_usage"]

_MIB = 2**20


class Usage(NamedTuple):
    """What this process holds after ``step`` steps.

    Attributes:
        step: steps done.
        seconds: of a clock that starts anywhere.
        memory: resident set of the process, in MiB.
        allocated: what of it malloc has given out and not got back, in MiB: a leak shows here.
            The resident set also holds what malloc keeps for later, and code compiled at run time.
            NaN where the C library is not glibc 2.33 or newer.
        files: open file handles: files, sockets, pipes.
        threads: of the process, its main one included.
        children: processes that it started and that live.
        children_memory: their resident sets together, in MiB. Pages that they share with this
            process or with each other count in each of them.
    """

    step: int
    seconds: float
    memory: float
    allocated: float
    files: int
    threads: int
    children: int
    children_memory: float


def read_usage(step: int) -> Usage:
    """What this process holds now, by /proc.

    Raises:
        OSError: there is no /proc, as on macOS.
    """
    threads = os.listdir("/proc/self/task")
    children = []
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                children += [int(child) for child in file.read().split()]
        except FileNotFoundError:  # it ended in between
            continue
    return Usage(
        step=step,
        seconds=time.monotonic(),
        memory=_resident(os.getpid()),
        allocated=_allocated(),
        files=len(os.listdir("/proc/self/fd")) - 1,  # but the one that lists them
        threads=len(threads),
        children=len(children),
        children_memory=sum(map(_resident, children)),
    )


def _resident(process: int) -> float:
    try:
        with open(f"/proc/{process}/statm") as file:
            pages = int(file.read().split()[1])
    except FileNotFoundError:  # it ended in between
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


class _MallInfo(ctypes.Structure):
    """malloc.h: struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocated() -> float:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return math.nan
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return (info.uordblks + info.hblkhd) / _MIB  # of all arenas, and in maps of their own


def growth(values: Sequence[float]) -> float:
    """How much higher the peak of a run's last quarter is than that of its second one.

    Peaks, because memory follows the size of the pictures; not the first quarter, because caches
    and pools fill there. What leaks at a steady rate has leaked twice this in the whole run.

    Args:
        values: at equal distances, 4 or more.

    Raises:
        ValueError: there are fewer.
    """
    if len(values) < 4:
        raise ValueError(f"values: {len(values)} given, expected 4 or more")
    _, second, _, last = np.array_split(np.asarray(values, dtype=float), 4)
    return float(last.max() - second.max())
