"""run_tool and check_gpus."""

import re
import sys

import pytest
import torch

from d2_deform.data.classification_mapper import ClassificationMapper
from d2_deform.engine import ConfigError, processes, run_tool
from d2_deform.engine.processes import check_gpus


@pytest.mark.parametrize(
    "found, built, message",
    [
        (1, {"cpu", "cuda"}, "this machine has 1;"),
        (2, {"cpu"}, "operators are built for CPU only;"),
        (2, {"cpu", "cuda"}, None),
    ],
)
def test_several_gpus(found, built, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(processes, "built_devices", lambda: frozenset(built))
    check_gpus(1)
    if message is None:
        check_gpus(2)
    else:
        with pytest.raises(SystemExit, match=f"error: --num-gpus 2: .*{message}"):
            check_gpus(2)


def test_several_gpus_without_our_operators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "built_devices", lambda: frozenset({"cpu"}))
    check_gpus(2, needs_operators=False)
    with pytest.raises(SystemExit, match="this machine has 2;"):
        check_gpus(3, needs_operators=False)


def test_arguments_reach_the_tool(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "--num-gpus", "0", "--resume", "A.KEY", "1"])
    given = []
    run_tool(given.append)
    (args,) = given
    assert args.resume and args.opts == ["A.KEY", "1"]


def read_nothing(args):
    ClassificationMapper(is_train=False)({"file_name": "/nowhere.jpg", "label": 0})


def read_nothing_in_a_data_loader(args):
    dataset = torch.utils.data.StackDataset(torch.arange(1))
    mapper = ClassificationMapper(is_train=False)
    list(
        torch.utils.data.DataLoader(
            dataset,
            num_workers=1,
            collate_fn=lambda batch: mapper({"file_name": "/nowhere.jpg", "label": 0}),
        )
    )


def misconfigured(args):
    raise ConfigError("KEY is wrong.")


@pytest.mark.parametrize(
    "main, line",
    [
        (misconfigured, r"error: KEY is wrong.$"),
        (read_nothing, r"error: /nowhere.jpg cannot be read as a picture \(.*$"),
        (read_nothing_in_a_data_loader, r"error: /nowhere.jpg cannot be read as a picture \(.*$"),
    ],
)
def test_mistakes_get_one_line(main, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "--num-gpus", "0"])
    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert re.fullmatch(line, ended.value.code)
