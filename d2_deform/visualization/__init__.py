"""Pictures of where a deformable network looks."""

from d2_deform.visualization.figure import draw_prediction_figure, predict_with_figure
from d2_deform.visualization.sampling import (
    SamplingRecord,
    draw_part_bins,
    draw_sampling_points,
    part_bins,
    record_sampling,
    trace_sampling_locations,
)

__all__ = [
    "SamplingRecord",
    "draw_part_bins",
    "draw_prediction_figure",
    "draw_sampling_points",
    "part_bins",
    "predict_with_figure",
    "record_sampling",
    "trace_sampling_locations",
]
