"""Checkpoints that are whole or not there, and what is said of those that are not."""

import itertools
import os
import random
import resource
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from d2_deform.engine import ConfigError
from d2_deform.engine.checkpointer import WholeCheckpointer
from d2_deform.engine.whole_file import open_whole, write_whole


@contextmanager
def full_disk(free):
    """No file may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def model():
    return nn.Linear(100, 100)


def test_saves_and_resumes(model, tmp_path):
    checkpointer = WholeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000004", iteration=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000004.pth",
    ]
    weight = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    assert WholeCheckpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 4
    assert torch.equal(model.weight, weight)


def test_a_full_disk_leaves_what_was_there(model, tmp_path):
    checkpointer = WholeCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    weight = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    with full_disk(10_000), pytest.raises(OSError, match=r"too large: '.*/model\.pth'"):
        checkpointer.save("model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    WholeCheckpointer(model, str(tmp_path)).resume_or_load("")
    assert torch.equal(model.weight, weight)


def test_a_kill_during_the_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(str(path), "before")
    with pytest.raises(KeyboardInterrupt), open_whole(str(path)) as file:
        file.write(b"aft")
        file.flush()
        assert path.read_text() == "before"  # what a kill at this moment would leave
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_killed_again_and_again_while_it_saves(tmp_path):
    model = nn.Linear(2000, 1000)  # 8 MB
    checkpointer = WholeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0", iteration=0)
    moments = random.Random(0)
    cut_off = 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                for iteration in itertools.count():
                    checkpointer.save(f"model_{iteration % 2}", iteration=iteration)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.05, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut_off += len(list(tmp_path.glob("*.tmp")))
        resumed = WholeCheckpointer(nn.Linear(2000, 1000), str(tmp_path)).resume_or_load("")
        assert isinstance(resumed["iteration"], int)
    assert cut_off  # the kills did come while files were written


def test_what_cannot_be_resumed_is_named(model, tmp_path):
    checkpointer = WholeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000004")
    checkpointer.save("model_0000009")
    (tmp_path / "model_0000009.pth").unlink()
    with pytest.raises(ConfigError, match=r"'model_0000009.pth', which is .*\(model_0000004.pth\)"):
        checkpointer.resume_or_load("")
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(ConfigError, match=r"last_checkpoint names '', which is not there"):
        checkpointer.resume_or_load("")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_named(model, tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights\.pth cannot be read as a checkpoint \("):
        WholeCheckpointer(model).load(str(path))
