"""Operators called by several threads at once, in forked processes, and while the interpreter ends:
no deadlock, no crash, the same results. Each scene is a process of its own with a time limit."""

import signal
import subprocess
import sys

SECONDS = 300  # of which a scene needs about five, on a free processor

# work(): results of the three operators with their gradients, the same in every call.
WORK = """
import torch
from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

def work():
    random = torch.Generator().manual_seed(0)
    def normal(*shape):
        return torch.randn(shape, generator=random).requires_grad_()
    x, offset, weight = normal(2, 36, 12, 12), normal(2, 18, 12, 12), normal(24, 36, 3, 3)
    boxes = torch.tensor([[0, 8, 8, 80, 90], [1, -5, 0, 64, 64], [0, 40, 2, 60, 50]] * 8).float()
    shifts = normal(24, 2, 3, 3)
    outputs = [
        deform_conv2d(x, offset, weight, padding=1),
        deform_roi_pool(x, boxes, shifts, 3, 1 / 8),
        deform_ps_roi_pool(x, boxes, shifts, 3, 3, 1 / 8),
    ]
    total = sum(output.square().sum() for output in outputs)
    gradients = torch.autograd.grad(total, [x, offset, weight, shifts])
    return [t.detach() for t in (*outputs, *gradients)]

def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

torch.set_num_threads(2)
"""


def run(scene: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", WORK + scene]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


def test_several_threads_at_once() -> None:
    """From the first call on, which sets up what all use, each caller gets what one gets."""
    scene = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
start = Barrier(4)
def together(_):
    start.wait()
    return work()
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(together, range(40)))
expected = work()
print([equal(expected, each) for each in results].count(True))
"""
    result = run(scene)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "40"


def test_forked_workers_of_a_data_loader() -> None:
    """Forked after the operators had threads in the parent, which goes on working. A data loader
    gives each worker one thread; with more, torch itself cannot work after a fork."""
    scene = """
from torch.utils.data import DataLoader, Dataset
class Results(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return work()
expected = work()
loader = DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context="fork")
print([equal(expected, each) and equal(expected, work()) for each in loader].count(True))
"""
    result = run(scene)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8"


def test_interpreter_ends_while_threads_compute() -> None:
    """It ends. Where a daemon thread is within a call then, torch aborts for its own operators too:
    the thread may not come back to Python."""
    scene = """
import threading, time
work()
def forever():
    while True:
        work()
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.5)
print("the end")
"""
    result = run(scene)
    assert result.stdout.strip() == "the end"
    assert result.returncode in (0, -signal.SIGABRT), result.stderr
