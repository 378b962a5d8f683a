"""A schedule written for one number of processes, run on another."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from d2_deform.engine.defaults import ConfigError

logger = logging.getLogger(__name__)

_SCALED_KEYS = (
    "IMS_PER_BATCH",
    "BASE_LR",
    "WEIGHT_DECAY",
    "WEIGHT_DECAY_NORM",
    "WEIGHT_DECAY_BIAS",
    "WARMUP_ITERS",
    "STEPS",
    "MAX_ITER",
    "CHECKPOINT_PERIOD",
)

__all__ = ["scale_to_world_size"]


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """The config for ``world_size`` processes, if it is written for another number of them.

    With SOLVER.REFERENCE_WORLD_SIZE r > 0 and n = ``world_size`` this is Detectron2's linear rule
    (:meth:`detectron2.engine.DefaultTrainer.auto_scale_workers`): IMS_PER_BATCH and BASE_LR times
    n / r; MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD times r / n, so
    that as many pictures are seen. WARMUP_FACTOR is relative to BASE_LR and stays.

    Weight decay stays too, and with it the decay per picture seen, unless
    SOLVER.SCALE_WEIGHT_DECAY: then every weight decay is multiplied by r / n, as happens in the
    official release, whose rule is another. It SUMS the gradients of n GPUs with one picture each
    and adds the decay to the sum; with rate a, decay d and mean gradient g, its step is
    a * (n * g + d * w) = (a * n) * (g + (d / n) * w): Detectron2's, which averages, at the rate
    a * n and the decay d / n. Its a = d = 5e-4 is 4e-3 and 6.25e-5 at 8 GPUs, 2e-3 and 1.25e-4 at
    4. The decay of one step is then the same on any number of GPUs, so a run on fewer of them,
    which takes more steps, decays more. All this is of SGD.

    Args:
        cfg: not changed.
        world_size: number of processes of this run, of all machines.

    Returns:
        A scaled copy, whose REFERENCE_WORLD_SIZE is ``world_size``, so that nothing scales it
        again; ``cfg`` itself where the numbers are equal or REFERENCE_WORLD_SIZE is 0.

    Raises:
        ConfigError: IMS_PER_BATCH is not a multiple of REFERENCE_WORLD_SIZE.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    if reference < 0 or cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference}, so it cannot be scaled to {world_size} "
            "process(es); make it one, or set REFERENCE_WORLD_SIZE 0 to take the schedule as it is."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if cfg.SOLVER.SCALE_WEIGHT_DECAY:
        frozen = scaled.is_frozen()
        scaled.defrost()
        for key in ("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"):
            if scaled.SOLVER[key] is not None:  # Detectron2: the bias decays as all else
                scaled.SOLVER[key] *= reference / world_size
        if frozen:
            scaled.freeze()
    changes = _changes(cfg.SOLVER, scaled.SOLVER)
    logger.info(
        "The schedule is for %d processes, this run has %d: %s", reference, world_size, changes
    )
    return scaled


def _changes(old: CfgNode, new: CfgNode) -> str:
    return ", ".join(
        f"{key} {_show(old[key])} -> {_show(new[key])}" if old[key] != new[key] else f"{key} stays"
        for key in _SCALED_KEYS
        if old[key]
    )


def _show(value: float | tuple[int, ...]) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
