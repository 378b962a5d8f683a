"""Values of config keys that would fail late, or not at all and train nothing sensible.

What depends on the network or on the data (layers, groups, classes, ...) is checked where that is
known.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.solver import build_lr_scheduler
from fvcore.common.registry import Registry
from torch import nn

__all__ = ["RANGES", "REGISTRIES", "check_values", "suggest"]


@dataclass(frozen=True)
class Range:
    """What a key may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    accepted: str


def _at_least(least: int) -> Range:
    return Range(lambda value: value >= least, f"{least} or more")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)

_FINITE = Range(_is_finite, "a finite number")
_FACTOR = Range(lambda value: _is_finite(value) and value >= 0, "0 or more")
_FACTOR_OR_NONE = Range(
    lambda value: value is None or (_is_finite(value) and value >= 0), "None, or 0 or more"
)

RANGES = {
    "DATALOADER.NUM_WORKERS": _at_least(0),
    "MODEL.DEFORM_ROI_HEADS.CONV_DIM": _at_least(0),
    "MODEL.DEFORM_ROI_HEADS.GAMMA": _FINITE,
    "MODEL.DEFORM_ROI_HEADS.OFFSET_FC_DIMS": Range(
        lambda value: all(isinstance(width, int) and width >= 1 for width in value),
        "a list of numbers of 1 or more",
    ),
    "MODEL.RFCN.GAMMA": _FINITE,
    "SEED": Range(lambda value: value < 2**32, "below 2**32; negative: none"),
    "SOLVER.BASE_LR": _FACTOR,
    "SOLVER.CHECKPOINT_PERIOD": _at_least(1),
    "SOLVER.IMS_PER_BATCH": _at_least(1),
    "SOLVER.MAX_ITER": _at_least(1),
    "SOLVER.NEW_CONV_LR_FACTOR": _FACTOR,
    "SOLVER.OFFSET_LR_FACTOR": _FACTOR_OR_NONE,
    "SOLVER.ROI_OFFSET_LR_FACTOR": _FACTOR_OR_NONE,
    "SOLVER.WARMUP_ITERS": _at_least(0),
    "TEST.EVAL_PERIOD": _at_least(0),
    "DATALOADER.SAMPLER_TRAIN": Range(
        lambda value: value in _SAMPLERS, f"one of {', '.join(_SAMPLERS)}"
    ),
}

REGISTRIES: dict[str, Registry] = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
_NOT_REGISTERED = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}  # known by its name


def check_values(cfg: CfgNode) -> None:
    """Checks the keys above, the device, the backbone's norm and the schedule.

    Raises:
        ValueError: the line names the key, what was given and what is accepted.
    """
    for key, allowed in RANGES.items():
        value = _value(cfg, key)
        if not allowed.holds(value):
            raise ValueError(f"{key} is {value!r}; expected {allowed.accepted}.")
    for key, registry in REGISTRIES.items():
        name = _value(cfg, key)
        if name not in registry and name != _NOT_REGISTERED.get(key):
            known = sorted(known for known, _ in registry)
            raise ValueError(
                f"{key} is {name!r}; expected one of {', '.join(known)}.{suggest(name, known)}"
            )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; expected cpu, cuda or cuda:0, ..."
        ) from error
    try:
        get_norm(cfg.MODEL.RESNETS.NORM, 1)
    except KeyError as error:
        raise ValueError(
            f"MODEL.RESNETS.NORM is {cfg.MODEL.RESNETS.NORM!r}; expected BN, FrozenBN, SyncBN, GN "
            "or another name of Detectron2's get_norm."
        ) from error
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    except (AssertionError, ValueError) as error:
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME, STEPS, WARMUP_METHOD, ...: {error}") from error


def suggest(name: str, known: Sequence[str]) -> str:
    """ " Did you mean ...?" where one of the known names is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _value(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg
