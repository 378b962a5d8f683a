"""A training that was broken off goes on as if it had not been."""

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine import DeformTrainer, load_config
from d2_deform.engine.loss_guard import NonFiniteLoss
from d2_deform.engine.repeatable import SeedEachStep

LAST, STOP = 7, 4  # iterations


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "voc"
    settings = DeformedDigitsSettings(image_size=64, min_height=0.3)
    write_deformed_digits(str(folder), "train", 7, settings=settings)
    return str(folder)


@pytest.fixture
def build(digits, tmp_path, request):
    """Builds a trainer that writes into a folder of a name."""

    def build(name, *options):
        cfg = load_config(
            str(request.config.rootpath / "configs" / "quickstart.yaml"),
            [
                *("DATASETS.VOC_FOLDER.ROOT", digits),
                *("DATASETS.TRAIN", "('voc_folder_train',)", "DATASETS.TEST", "()"),
                *("DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(48, 64)"),
                *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
                *("MODEL.RFCN.CONV_DIM", "8", "SOLVER.IMS_PER_BATCH", "2"),
                *("SOLVER.MAX_ITER", str(LAST + 1), "SOLVER.CHECKPOINT_PERIOD", "3"),
                *("SOLVER.WARMUP_ITERS", "0", "SEED", "3", "OUTPUT_DIR", str(tmp_path / name)),
                *options,
            ],
            use_gpu=False,
        )
        seed_all_rng(max(cfg.SEED, 0))
        return DeformTrainer(cfg)

    return build


class After(HookBase):
    """Does something after an iteration's step."""

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def after_step(self):
        if self.trainer.iter == self.iteration:
            self.act()


def state(folder):
    checkpoint = torch.load(folder / "model_final.pth")
    return checkpoint["model"], checkpoint["trainer"]["_trainer"]["optimizer"]["state"]


def last_losses(folder):
    record = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    return {name: value for name, value in record.items() if "loss" in name or "/" in name}


def assert_same_runs(folder, other):
    torch.testing.assert_close(state(folder), state(other), rtol=0, atol=0)
    assert last_losses(folder) == last_losses(other)


@pytest.mark.parametrize("grouping", ["False", "True"])
def test_killed_and_resumed(build, tmp_path, grouping):
    options = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    build("unbroken", *options).train()

    child = os.fork()
    if child == 0:
        try:
            trainer = build("killed", *options, "DATALOADER.NUM_WORKERS", "2")
            trainer.register_hooks([After(STOP, lambda: os.kill(os.getpid(), signal.SIGKILL))])
            trainer.train()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    trainer = build("killed", *options)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 3
    trainer.train()
    assert_same_runs(tmp_path / "killed", tmp_path / "unbroken")


def test_stops_at_sigterm(build, tmp_path, caplog, monkeypatch):
    build("unbroken").train()

    def terminate():  # as a cluster does: every process of the job, from without
        processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        assert len(processes) >= 3
        subprocess.run(["kill", *map(str, processes)], check=True)

    monkeypatch.setattr(logging.getLogger("d2_deform"), "propagate", True)
    before = signal.getsignal(signal.SIGTERM)
    trainer = build("stopped", "DATALOADER.NUM_WORKERS", "2")
    trainer.register_hooks([After(STOP - 1, terminate)])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert f"Stopped by SIGTERM after iteration {STOP}; --resume goes on" in caplog.text
    assert (tmp_path / "stopped" / "last_checkpoint").read_text() == f"model_{STOP:07d}.pth"

    trainer = build("stopped")
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == STOP + 1
    trainer.train()
    assert_same_runs(tmp_path / "stopped", tmp_path / "unbroken")


def test_a_checkpoint_of_the_same_iteration_is_not_written_again(build, tmp_path):
    """Stopped at its last iteration, a resumed run has but its evaluation left."""
    trainer = build("run")
    trainer.register_hooks([After(LAST - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    with pytest.raises(SystemExit):
        trainer.train()
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    assert not (tmp_path / "run" / f"model_{LAST:07d}.pth").exists()

    trainer = build("run")
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert trainer.iter == trainer.storage.iter == LAST + 1


def test_without_a_seed_all_is_detectron2s(build):
    trainer = build("run", "SEED", "-1", "SOLVER.MAX_ITER", "1")
    assert not any(isinstance(hook, SeedEachStep) for hook in trainer._hooks)
    loader = trainer.data_loader
    trainer.train()
    assert trainer.data_loader is loader


def test_a_loss_that_is_no_number_names_the_pictures(build, tmp_path):
    trainer = build("run")

    def spoil():
        trainer.model.roi_heads.cls_score.bias.data.fill_(float("nan"))

    trainer.register_hooks([After(1, spoil)])
    with pytest.raises(NonFiniteLoss) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("iteration 2: a loss or prediction became infinite or NaN")
    assert "loss_cls nan" in message and "SOLVER.BASE_LR" in message
    assert len(re.findall(r"JPEGImages/\w+\.jpg", message)) == 2
    assert not list((tmp_path / "run").glob("*.pth"))
