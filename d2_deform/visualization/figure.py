"""One figure of a prediction: boxes, sampling points, part bins."""

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from d2_deform.visualization.sampling import (
    draw_part_bins,
    draw_sampling_points,
    has_deform_convs,
    has_deform_pooling,
    part_bins,
    trace_sampling_locations,
)

__all__ = ["draw_prediction_figure"]

PANEL_SIDE = 480  # pixels of a panel's longer side
TITLE_HEIGHT = 28  # pixels
BOX_COLOURS = (
    *("#00e5ff", "#ffea00", "#76ff03", "#ff4081", "#ff9100"),
    *("#7c9cff", "#1de9b6", "#e040fb", "#ff5252", "#ffffff"),
)


def draw_prediction_figure(
    predictor: DefaultPredictor,
    image: np.ndarray,
    confidence_threshold: float = 0.5,
    location: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draws what a detector found and where it looked.

    Left to right: the detections; the sampling locations of one activation, followed back through
    the last three deformable convolutions; the bins of one detection's deformable RoI pooling. A
    model without the one or the other has fewer panels.

    Args:
        predictor: Detectron2's, with the model.
        image: uint8 (H, W, 3), BGR, as ``cv2.imread`` gives it.
        confidence_threshold: detections below it are left out.
        location: (x, y) in pixels, of the activation to trace; None: the middle of the most
            confident detection, or of the picture where nothing is found.

    Returns:
        uint8 picture, RGB, of panels side by side.
    """
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    scale = PANEL_SIDE / max(rgb.shape[:2])
    detections: Instances = predictor(image)["instances"].to("cpu")
    detections = detections[detections.scores >= confidence_threshold]
    best = detections[int(detections.scores.argmax())] if len(detections) else None
    if location is None:
        location = _middle(best, rgb)

    network_input = _as_network_input(predictor, image)
    ratio = (network_input.shape[2] / rgb.shape[1], network_input.shape[1] / rgb.shape[0])

    names = getattr(getattr(predictor, "metadata", None), "thing_classes", None)
    panels = {"detections": _draw_detections(rgb, detections, names, scale)}
    if has_deform_convs(predictor.model):
        place = (location[0] * ratio[0], location[1] * ratio[1])
        points = trace_sampling_locations(predictor.model, network_input, place) / ratio
        title = f"{len(points)} sampling locations of one activation"
        panels[title] = draw_sampling_points(rgb, points, location, scale)
    if has_deform_pooling(predictor.model) and best is not None:
        boxes = best.pred_boxes.tensor
        bins = part_bins(
            predictor.model, network_input, boxes * torch.tensor(ratio * 2), best.pred_classes
        ) / torch.tensor(ratio * 2)
        title = f"{bins.shape[1]} x {bins.shape[2]} bins of the most confident detection"
        panels[title] = draw_part_bins(rgb, boxes, bins, scale)
    return _put_side_by_side(panels)


def _draw_detections(
    image: np.ndarray, detections: Instances, names: list[str] | None, scale: float
) -> np.ndarray:
    """Boxes in one strong colour a class, each with its class and score."""
    classes = detections.pred_classes.tolist()
    labels = [
        f"{names[label] if names else label}: {score:.0%}"
        for label, score in zip(classes, detections.scores.tolist(), strict=True)
    ]
    visualizer = Visualizer(image, scale=scale, font_size_scale=1.5)
    colours = [to_rgb(BOX_COLOURS[label % len(BOX_COLOURS)]) for label in classes]
    visualizer.overlay_instances(
        boxes=detections.pred_boxes, labels=labels, assigned_colors=colours
    )
    for box, colour in zip(detections.pred_boxes, colours, strict=True):
        visualizer.draw_box(box.tolist(), alpha=1.0, edge_color=colour)
    return visualizer.output.get_image()


def _middle(detection: Instances | None, image: np.ndarray) -> tuple[float, float]:
    if detection is None:
        return image.shape[1] / 2, image.shape[0] / 2
    x, y = detection.pred_boxes.get_centers()[0].tolist()
    return x, y


def _as_network_input(predictor: DefaultPredictor, image: np.ndarray) -> Tensor:
    """The tensor that ``DefaultPredictor`` makes of a BGR picture."""
    if predictor.input_format == "RGB":
        image = image[:, :, ::-1]
    resized = predictor.aug.get_transform(image).apply_image(image)
    return torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))


def _put_side_by_side(panels: dict[str, np.ndarray]) -> np.ndarray:
    """Panels of the same height, each under its title."""
    gap = 12
    height = max(panel.shape[0] for panel in panels.values()) + TITLE_HEIGHT + gap
    width = sum(panel.shape[1] + gap for panel in panels.values()) + gap
    dpi = 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left = gap
    for title, panel in panels.items():
        figure.figimage(panel, left, gap)
        figure.text(
            (left + panel.shape[1] / 2) / width,
            1 - 0.5 * TITLE_HEIGHT / height,
            title,
            ha="center",
            va="center",
            fontsize=11,
        )
        left += panel.shape[1] + gap
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
