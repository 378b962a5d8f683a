"""What a network costs (paper table 4) and how far its deformable filters reach (table 2)."""

from d2_deform.analysis.effective_dilation import (
    FILTER_CLASSES,
    SIZE_LIMITS,
    LayerDilation,
    build_loader_with_boxes,
    measure_effective_dilation,
)
from d2_deform.analysis.effective_dilation_report import (
    dilation_table,
    dilations_as_dict,
    draw_dilation_histograms,
    summarize_dilations,
)
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
    "FILTER_CLASSES",
    "FLOP_HANDLES",
    "SIZE_LIMITS",
    "TASKS",
    "LayerDilation",
    "Report",
    "activations_by_part",
    "analyze_model",
    "assign_parts",
    "build_loader_with_boxes",
    "compare_reports",
    "dilation_table",
    "dilations_as_dict",
    "draw_dilation_histograms",
    "fit_batch_norms",
    "flops_by_part",
    "measure_effective_dilation",
    "parameters_by_part",
    "prepare_input",
    "random_picture",
    "read_picture",
    "runtime_by_part",
    "summarize_dilations",
]
