"""Pictures of where a deformable network looks."""

from d2_deform.visualization.figure import draw_prediction_figure
from d2_deform.visualization.sampling import (
    draw_part_bins,
    draw_sampling_points,
    part_bins,
    trace_sampling_locations,
)

__all__ = [
    "draw_part_bins",
    "draw_prediction_figure",
    "draw_sampling_points",
    "part_bins",
    "trace_sampling_locations",
]
