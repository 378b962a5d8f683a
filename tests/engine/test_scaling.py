"""scale_to_world_size by numbers worked out by hand."""

import logging

import pytest
import torch
from detectron2.config import get_cfg

from d2_deform.config import add_deform_config
from d2_deform.engine import ConfigError
from d2_deform.engine.scaling import scale_to_world_size


def config(max_iter=30000, steps=(20000,), **solver):
    """The paper's schedule for 8 GPUs with one picture each, in Detectron2's terms."""
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.BASE_LR = 0.004
    cfg.SOLVER.WEIGHT_DECAY = 0.0000625
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    cfg.SOLVER.WARMUP_ITERS = 1000
    cfg.SOLVER.WARMUP_FACTOR = 0.1
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.SOLVER.STEPS = steps
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    cfg.SOLVER.SCALE_WEIGHT_DECAY = True
    cfg.TEST.EVAL_PERIOD = 10000
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


VOC, COCO = (30000, (20000,)), (240000, (160000,))


@pytest.mark.parametrize(
    "schedule, world_size, ims, lr, decay, warmup, steps, max_iter",
    [
        (VOC, 8, 8, 4e-3, 6.25e-5, 1000, (20000,), 30000),
        (VOC, 4, 4, 2e-3, 1.25e-4, 2000, (40000,), 60000),
        (VOC, 1, 1, 5e-4, 5e-4, 8000, (160000,), 240000),
        (COCO, 8, 8, 4e-3, 6.25e-5, 1000, (160000,), 240000),
        (COCO, 4, 4, 2e-3, 1.25e-4, 2000, (320000,), 480000),
        (COCO, 1, 1, 5e-4, 5e-4, 8000, (1280000,), 1920000),
        (COCO, 16, 16, 8e-3, 3.125e-5, 500, (80000,), 120000),
    ],
)
def test_the_papers_schedules(schedule, world_size, ims, lr, decay, warmup, steps, max_iter):
    solver = scale_to_world_size(config(*schedule), world_size).SOLVER
    assert solver.IMS_PER_BATCH == ims
    assert solver.BASE_LR == pytest.approx(lr)
    assert solver.WEIGHT_DECAY == pytest.approx(decay)
    assert solver.WEIGHT_DECAY_BIAS == 0
    assert (solver.WARMUP_ITERS, solver.STEPS, solver.MAX_ITER) == (warmup, steps, max_iter)
    assert solver.WARMUP_FACTOR == 0.1
    assert solver.REFERENCE_WORLD_SIZE == world_size


@pytest.fixture
def lines(caplog, monkeypatch):
    """What is logged; a logger that Detectron2 has set up keeps its lines from pytest."""
    monkeypatch.setattr(logging.getLogger("d2_deform"), "propagate", True)
    caplog.set_level(logging.INFO, logger="d2_deform")
    return caplog


def test_periods_and_what_is_said(lines):
    cfg = scale_to_world_size(config(), 4)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (10000, 20000)
    (line,) = [r.getMessage() for r in lines.records if r.name.startswith("d2_deform")]
    assert line == (
        "The schedule is for 8 processes, this run has 4: IMS_PER_BATCH 8 -> 4, BASE_LR 0.004 -> "
        "0.002, WEIGHT_DECAY 6.25e-05 -> 0.000125, WARMUP_ITERS 1000 -> 2000, STEPS (20000,) -> "
        "(40000,), MAX_ITER 30000 -> 60000, CHECKPOINT_PERIOD 5000 -> 10000"
    )


def test_decay_stays_in_the_usual_rule():
    solver = scale_to_world_size(config(SCALE_WEIGHT_DECAY=False), 1).SOLVER
    assert (solver.WEIGHT_DECAY, solver.BASE_LR) == (0.0000625, pytest.approx(5e-4))


def test_a_decay_that_is_not_set_stays_so():
    solver = scale_to_world_size(config(WEIGHT_DECAY_BIAS=None, WEIGHT_DECAY_NORM=0.01), 4).SOLVER
    assert solver.WEIGHT_DECAY_BIAS is None
    assert solver.WEIGHT_DECAY_NORM == pytest.approx(0.02)


@pytest.mark.parametrize("reference", [0, 2])
def test_nothing_changes(reference, lines):
    cfg = config(REFERENCE_WORLD_SIZE=reference)
    assert scale_to_world_size(cfg, 2) is cfg
    assert not lines.records


def test_the_config_given_is_kept_and_a_frozen_one_stays_frozen():
    cfg = config()
    cfg.freeze()
    before = cfg.dump()
    scaled = scale_to_world_size(cfg, 1)
    assert cfg.dump() == before and scaled.is_frozen()
    assert scale_to_world_size(scaled, 1) is scaled


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 2, not a multiple of .*_SIZE 8, so"):
        scale_to_world_size(config(IMS_PER_BATCH=2), 1)


@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_it_is_what_summed_gradients_do(world_size):
    """One step by the release's rule (5e-4, decay 5e-4 added to the sum) and by Detectron2's."""
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.float64)
    gradients = torch.randn(world_size, 5, dtype=torch.float64)
    released = start - 5e-4 * (gradients.sum(0) + 5e-4 * start)

    solver = scale_to_world_size(config(), world_size).SOLVER
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    weight.grad = gradients.mean(0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), released, rtol=1e-12, atol=1e-12)
