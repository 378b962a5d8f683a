"""Two processes on CPU do what one does with the double batch, and none waits for a dead one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import default_argument_parser, launch
from detectron2.engine.launch import _find_free_port
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine import ConfigError, DeformTrainer, load_config, processes
from d2_deform.engine.processes import run_in_processes
from d2_deform.evaluation import ClassificationEvaluator

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join(REPOSITORY, "configs", "quickstart.yaml")
TRAIN_NET = os.path.join(REPOSITORY, "tools", "train_net.py")
PICTURES = 5  # odd, so that two processes evaluate unequal numbers
pytestmark = pytest.mark.xdist_group("several_processes")  # which share what is trained
SECONDS = 600  # to end in, on a busy machine; who waits for the dead waits half an hour


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny R-FCN without random choices, and losses that are means over equally many parts."""
    folder = str(tmp_path_factory.mktemp("digits") / "voc")
    settings = DeformedDigitsSettings(image_size=64, min_height=0.3)
    write_deformed_digits(folder, "train", PICTURES, settings=settings)
    return [
        *("DATASETS.VOC_FOLDER.ROOT", folder),
        *("DATASETS.TRAIN", "('voc_folder_train',)"),
        *("DATASETS.TEST", "('voc_folder_train',)"),
        *("DATALOADER.NUM_WORKERS", "0"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
        *("MODEL.RFCN.CONV_DIM", "8"),
        *("MODEL.RESNETS.NORM", "FrozenBN"),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "4096"),  # all anchors
        *("MODEL.RPN.LOSS_WEIGHT", "16.0"),
        *("MODEL.RPN.NMS_THRESH", "1.0"),
        *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "20"),  # all proposals
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
        *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False"),
        *("SOLVER.OPTIMIZER", "SGD"),
        *("SOLVER.BASE_LR", "0.01"),
        *("SOLVER.WARMUP_ITERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "4"),
        *("SOLVER.MAX_ITER", "3"),
    ]


def train(options):
    cfg = load_config(CONFIG, options, use_gpu=False)
    torch.set_num_threads(1)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(cfg.SEED + comm.get_rank())  # as detectron2.engine.default_setup
    trainer = DeformTrainer(cfg)
    trainer.train()


def results(folder):
    """Losses of a training and its final weights."""
    with open(folder / "metrics.json") as file:
        lines = [json.loads(line) for line in file]
    metrics = {key: value for line in lines for key, value in line.items()}
    losses = {key: value for key, value in metrics.items() if "loss" in key}
    return losses, torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    number = torch.get_num_threads()
    train([*options, "OUTPUT_DIR", str(folder)])
    torch.set_num_threads(number)
    return results(folder)


@pytest.fixture(scope="module")
def one_machine(options, tmp_path_factory):
    """Two processes of one machine train and evaluate."""
    folder = tmp_path_factory.mktemp("one_machine")
    arguments = [*options, "OUTPUT_DIR", str(folder)]
    launch(train_and_evaluate, 2, dist_url="auto", args=(arguments, str(folder)))
    return folder


def train_and_evaluate(options, folder):
    train(options)
    evaluate(options, folder)


def launch_on_two_machines(options, folder):
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    arguments = [*options, "OUTPUT_DIR", str(folder)]
    machines = [
        threading.Thread(target=launch, args=(train, 1, 2, rank, url, (arguments,)))
        for rank in range(2)
    ]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()


def torchrun(options, folder):
    words = ["--config-file", CONFIG, "--num-gpus", "0", *options, "OUTPUT_DIR", str(folder)]
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*starter, "--nproc-per-node", "2", TRAIN_NET, *words],
        env={**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


def check_equal(folder, one_process):
    losses, weights = results(folder)
    expected_losses, expected_weights = one_process
    assert losses["total_loss"] > 1 and weights["backbone.res5.1.conv2_offset.weight"].any()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_two_processes_are_one_with_the_double_batch(one_machine, one_process):
    check_equal(one_machine, one_process)


@pytest.mark.parametrize("start", [launch_on_two_machines, torchrun])
def test_however_they_are_started(start, options, one_process, tmp_path):
    start(options, tmp_path)
    check_equal(tmp_path, one_process)


def evaluate(options, folder):
    """Evaluates a network that finds every object, and a classifier that errs once."""
    cfg = load_config(CONFIG, options, use_gpu=False)
    (name,) = cfg.DATASETS.TEST
    detections = DeformTrainer.test(cfg, Oracle(name))
    evaluator = ClassificationEvaluator()
    for number in InferenceSampler(PICTURES):
        scores = torch.tensor([1.0, 0.5])
        evaluator.process([{"label": int(number == 3)}], [{"scores": scores}])
    classes = evaluator.evaluate()
    if comm.is_main_process():
        with open(os.path.join(folder, "results.json"), "w") as file:
            json.dump([detections, classes], file)


class Oracle(nn.Module):
    """Predicts the annotations themselves."""

    def __init__(self, name):
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(name)}

    def forward(self, inputs):
        return [{"instances": self.find(given["image_id"])} for given in inputs]

    def find(self, image_id):
        record = self.records[image_id]
        instances = Instances((record["height"], record["width"]))
        annotations = record["annotations"]
        instances.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in annotations]).float())
        instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        instances.scores = torch.ones(len(annotations))
        return instances


def test_every_picture_is_evaluated_once(one_machine):
    with open(one_machine / "results.json") as file:
        detections, classes = json.load(file)
    # Lost, a picture would lower the recall; counted twice, the precision.
    assert detections["bbox"]["AP"] == pytest.approx(100.0)
    assert classes["classification"]["top1"] == pytest.approx(80.0)


def die_as_the_second(args):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def test_a_killed_process_ends_the_others(monkeypatch):
    monkeypatch.setattr(processes, "check_gpus", lambda wanted, needs_operators: None)
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    args = default_argument_parser().parse_args(["--num-gpus", "2", "--dist-url", url])
    start = time.monotonic()
    with pytest.raises(SystemExit, match="process 1 of this machine was ended by SIGKILL"):
        run_in_processes(die_as_the_second, args)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("machines, is_passed_on", [("1", False), ("2", True)])
def test_sigterm_is_passed_on_to_started_processes(machines, is_passed_on, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    during = []
    monkeypatch.setattr(
        processes, "launch", lambda *_, **__: during.append(signal.getsignal(signal.SIGTERM))
    )
    words = ["--num-gpus", "0", "--num-machines", machines]
    run_in_processes(print, default_argument_parser().parse_args(words))
    assert (during != [before]) is is_passed_on
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words", [["--num-machines", "2"], ["--machine-rank", "1"], ["--num-gpus", "3"]]
)
def test_torchrun_and_options_of_launch(words, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = default_argument_parser().parse_args(words)
    with pytest.raises(ConfigError, match="torchrun starts the processes: give it --nnodes"):
        run_in_processes(print, args)


def test_two_machines_without_gpus_where_there_are_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = default_argument_parser().parse_args(["--num-gpus", "0", "--num-machines", "2"])
    with pytest.raises(ConfigError, match=r"hide them by .* CUDA_VISIBLE_DEVICES="):
        run_in_processes(print, args)
