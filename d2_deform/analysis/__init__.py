"""What a network costs: parameters, FLOPs, activations and time, part by part (paper table 4)."""

from d2_deform.analysis.inputs import (
    fit_batch_norms,
    prepare_input,
    random_picture,
    read_picture,
)
from d2_deform.analysis.operators import ACTIVATION_HANDLES, FLOP_HANDLES
from d2_deform.analysis.parts import (
    activations_by_part,
    assign_parts,
    flops_by_part,
    parameters_by_part,
    runtime_by_part,
)
from d2_deform.analysis.report import TASKS, Report, analyze_model, compare_reports

__all__ = [
    "ACTIVATION_HANDLES",
    "FLOP_HANDLES",
    "TASKS",
    "Report",
    "activations_by_part",
    "analyze_model",
    "assign_parts",
    "compare_reports",
    "fit_batch_norms",
    "flops_by_part",
    "parameters_by_part",
    "prepare_input",
    "random_picture",
    "read_picture",
    "runtime_by_part",
]
