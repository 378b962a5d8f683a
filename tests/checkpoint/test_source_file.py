"""Reading files of weights from elsewhere; what may run code does not, unless asked to."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_mxnet_file import pack

from d2_deform.checkpoint import read_source_file
from d2_deform.engine import ConfigError

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(1, 6, 1, 1), "conv.bias": torch.ones(1)}


class MakesFolder:
    """What a hostile pickle holds: a call of any function."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def assert_weights(got):
    assert list(got) == list(WEIGHTS)
    assert all(torch.equal(got[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize("wrap", [dict, OrderedDict, *("model", "state_dict")])
def test_finds_the_weights(tmp_path, wrap):
    path = str(tmp_path / "a.pth")
    saved = {wrap: WEIGHTS, "meta": {"epoch": 12}} if isinstance(wrap, str) else wrap(WEIGHTS)
    torch.save(saved, path)
    assert_weights(read_source_file(path))


def test_reads_mxnet_arrays_and_may_change_them(tmp_path):
    path = tmp_path / "a.params"
    path.write_bytes(pack({name: value.numpy() for name, value in WEIGHTS.items()}))
    got = read_source_file(str(path))
    assert_weights(got)
    got["conv.bias"] += 1


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_with_more_than_tensors_runs_only_if_asked_to(tmp_path, plain):
    made = tmp_path / "made"
    path = str(tmp_path / ("a.pkl" if plain else "a.pth"))
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    saved = {"model": arrays, "hidden": MakesFolder(str(made))}
    if plain:
        with open(path, "wb") as file:
            pickle.dump(saved, file)
    else:
        torch.save(saved, path)
    with pytest.raises(ConfigError, match=r"means to run whatever the file's author.*--trust-pick"):
        read_source_file(path)
    assert not made.exists()
    assert_weights(read_source_file(path, trust_pickle=True))
    assert made.exists()


def test_a_zoos_pickle_is_not_even_opened_unasked(tmp_path):
    path = str(tmp_path / "model_final_65c703.pkl")
    with open(path, "wb") as file:
        pickle.dump({"model": {"a": np.ones(2)}, "__author__": "Detectron2 Model Zoo"}, file)
    with pytest.raises(ConfigError, match="--trust-pickle"):
        read_source_file(path)
    assert torch.equal(read_source_file(path, True)["a"], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off", b"\x80\x04."])
@pytest.mark.parametrize("name", ["a.pth", "a.params", "a.pkl"])
def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path, name, content, trust):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        read_source_file(str(path), trust)
    assert str(refusal.value).startswith(f"--input {path}: ")
    assert "\n" not in str(refusal.value)


def test_what_holds_no_weights_is_told(tmp_path):
    path = str(tmp_path / "a.pth")
    for saved, message in (
        ([torch.ones(1)], "it holds a list and no weights"),
        ({}, "it holds a dict and no weights"),
        ({"epoch": 3}, "'epoch' is a int and no tensor; expected a dictionary"),
        ({"model": {1: torch.ones(1)}}, "1 is a Tensor and no tensor"),
    ):
        torch.save(saved, path)
        with pytest.raises(ConfigError, match=message):
            read_source_file(path)
    with pytest.raises(ConfigError, match=r"gone\.pth: No such file"):
        read_source_file(str(tmp_path / "gone.pth"))
