"""Memory, file handles and threads of this very process."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from d2_deform.analysis.process_usage import growth, read_usage


def test_files_threads_memory_and_children(tmp_path):
    before = read_usage(1)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with open(tmp_path / "file", "w"):
        filled = np.ones(2**27, dtype=np.uint8)  # 128 MiB
        after = read_usage(2)
    ended.set()
    thread.join()
    child.communicate(b"\n")
    assert (before.step, after.step) == (1, 2) and after.seconds > before.seconds
    assert after.files == before.files + 2  # the child's pipe, too
    assert after.threads == before.threads + 1
    assert after.memory - before.memory == pytest.approx(filled.nbytes / 2**20, abs=10)
    assert after.allocated - before.allocated == pytest.approx(filled.nbytes / 2**20, abs=10)
    assert after.children == before.children + 1
    assert after.children_memory > before.children_memory


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 9, 5, 3, 1, 1, 4, 5], 0),  # what comes first does not count
        ([0, 0, 5, 6, 7, 7, 8, 7], 2),
        ([1, 1, 7, 3, 3, 3, 5, 5], -2),
    ],
)
def test_growth(values, expected):
    assert growth(values) == expected


def test_too_few_values():
    with pytest.raises(ValueError, match="values: 3 given, expected 4 or more"):
        growth([1, 2, 3])
