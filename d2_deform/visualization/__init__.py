"""Pictures of where a deformable network looks."""

from d2_deform.visualization.drawing import draw_part_bins, draw_sampling_points
from d2_deform.visualization.explorer import build_explorer_page
from d2_deform.visualization.figure import (
    draw_offset_figure,
    draw_prediction_figure,
    predict_with_figure,
)
from d2_deform.visualization.prediction import SampledPrediction, predict_with_sampling
from d2_deform.visualization.sampling import (
    OffsetField,
    SamplingRecord,
    has_deformable_layer,
    part_bins,
    record_sampling,
    trace_sampling_locations,
)

__all__ = [
    "OffsetField",
    "SampledPrediction",
    "SamplingRecord",
    "build_explorer_page",
    "draw_offset_figure",
    "draw_part_bins",
    "draw_prediction_figure",
    "draw_sampling_points",
    "has_deformable_layer",
    "part_bins",
    "predict_with_figure",
    "predict_with_sampling",
    "record_sampling",
    "trace_sampling_locations",
]
