"""Optimizers with a learning rate of their own for the layers that predict offsets."""

from d2_deform.solver.build import LearningRateFactors, build_optimizer

__all__ = ["LearningRateFactors", "build_optimizer"]
