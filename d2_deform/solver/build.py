"""SGD or AdamW, with learning-rate factors for offset layers and R-FCN's new convolution."""

import logging
import math
from collections import Counter
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

logger = logging.getLogger(__name__)

CONV_OFFSET_LAYERS = frozenset({"conv1_offset", "conv2_offset", "conv_offset"})
POOL_OFFSET_LAYERS = frozenset({"offset_conv", "offset_fc"})
NEW_CONV_LAYERS = frozenset({"conv_new"})

# Where SOLVER.OFFSET_LR_FACTOR is None. 1 is the paper's, with SGD. Adam divides each gradient by
# its own size, so offsets, in cells, would move as fast as weights do and leave the map.
DEFAULT_OFFSET_LR_FACTOR = {"SGD": 1.0, "ADAMW": 0.05}

__all__ = ["LearningRateFactors", "build_optimizer"]


@dataclass(frozen=True)
class LearningRateFactors:
    """Factors of SOLVER.BASE_LR, by what a parameter's name says it belongs to.

    Attributes:
        offset: offset layers of convolutions.
        roi_offset: offset layers of RoI pooling.
        new_conv: R-FCN's 1x1 convolution after the backbone.

    Raises:
        ValueError: a factor is negative, infinite or NaN.
    """

    offset: float = 1.0
    roi_offset: float = 1.0
    new_conv: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in vars(self).items():
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"{name}: {factor} given, accepted: 0 or more")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "LearningRateFactors":
        """Reads SOLVER.OFFSET_LR_FACTOR, ROI_OFFSET_LR_FACTOR, NEW_CONV_LR_FACTOR, OPTIMIZER."""
        name = _optimizer_name(cfg)
        offset = cfg.SOLVER.OFFSET_LR_FACTOR
        if offset is None:
            offset = DEFAULT_OFFSET_LR_FACTOR[name]
        roi_offset = cfg.SOLVER.ROI_OFFSET_LR_FACTOR
        if roi_offset is None:
            roi_offset = offset
        return cls(float(offset), float(roi_offset), float(cfg.SOLVER.NEW_CONV_LR_FACTOR))

    def of(self, parameter_name: str) -> tuple[str, float]:
        """What kind of layer a parameter belongs to, and that kind's factor.

        Args:
            parameter_name: as ``named_parameters()`` has it, e.g.
                "backbone.res5.0.conv2_offset.weight".

        Returns:
            ("convolution offsets" | "pooling offsets" | "new convolution" | "others", factor).
        """
        layers = set(parameter_name.split(".")[:-1])
        if layers & POOL_OFFSET_LAYERS:
            return "pooling offsets", self.roi_offset
        if layers & CONV_OFFSET_LAYERS:
            return "convolution offsets", self.offset
        if layers & NEW_CONV_LAYERS:
            return "new convolution", self.new_conv
        return "others", 1.0


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a config, as Detectron2's builder does and with factors by layer.

    Weight decay, its keys for norms and biases, SOLVER.BIAS_LR_FACTOR and gradient clipping mean
    what they mean in Detectron2. Logs one line that lists the factors.

    Args:
        cfg: with the plugin's keys (``add_deform_config``).
        model: only parameters that require a gradient are given to the optimizer.

    Returns:
        ``torch.optim.SGD`` or, for SOLVER.OPTIMIZER "ADAMW", ``torch.optim.AdamW``.

    Raises:
        ValueError: SOLVER.OPTIMIZER is neither.
    """
    name = _optimizer_name(cfg)
    factors = LearningRateFactors.from_config(cfg)

    def lr_factor(parameter_name: str) -> float:
        # The bias factor is applied here, because Detectron2's `bias_lr_factor` would set the rate
        # of an offset layer's bias anew and lose its own factor.
        is_bias = parameter_name.rsplit(".", 1)[-1] == "bias"
        return factors.of(parameter_name)[1] * (cfg.SOLVER.BIAS_LR_FACTOR if is_bias else 1.0)

    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(
            params,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            foreach=True,
        )
    else:
        optimizer = torch.optim.AdamW(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True
        )
    _log_factors(cfg, model, factors)
    return maybe_add_gradient_clipping(cfg, optimizer)


def _optimizer_name(cfg: CfgNode) -> str:
    name = cfg.SOLVER.OPTIMIZER.upper()
    if name not in DEFAULT_OFFSET_LR_FACTOR:
        raise ValueError(
            f"SOLVER.OPTIMIZER is '{cfg.SOLVER.OPTIMIZER}'; expected one of "
            f"{', '.join(DEFAULT_OFFSET_LR_FACTOR)}."
        )
    return name


def _log_factors(cfg: CfgNode, model: nn.Module, factors: LearningRateFactors) -> None:
    numbers: Counter[tuple[str, float]] = Counter()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numbers[factors.of(parameter_name)] += parameter.numel()
    logger.info(
        "%s, learning rate %g times: %s",
        _optimizer_name(cfg),
        cfg.SOLVER.BASE_LR,
        ", ".join(
            f"{factor:g} for {kind} ({number:,} parameters)"
            for (kind, factor), number in sorted(numbers.items())
        ),
    )
