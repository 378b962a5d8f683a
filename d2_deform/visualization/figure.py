"""One figure of a prediction: boxes, sampling points, part bins."""

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from d2_deform.visualization.sampling import (
    draw_part_bins,
    draw_sampling_points,
    record_sampling,
)

__all__ = ["draw_prediction_figure", "predict_with_figure"]

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
    return predict_with_figure(predictor, image, confidence_threshold, location)[1]


def predict_with_figure(
    predictor: DefaultPredictor,
    image: np.ndarray,
    confidence_threshold: float = 0.5,
    location: tuple[float, float] | None = None,
) -> tuple[Instances, np.ndarray]:
    """Predicts once; as :func:`draw_prediction_figure`.

    Returns:
        The detections, on CPU, with those below the threshold; and the figure.
    """
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    scale = PANEL_SIDE / max(rgb.shape[:2])
    with record_sampling(predictor.model) as record:
        found: Instances = predictor(image)["instances"].to("cpu")
    detections = found[found.scores >= confidence_threshold]
    best = detections[int(detections.scores.argmax())] if len(detections) else None
    if location is None:
        location = _middle(best, rgb)
    ratio = _network_pixels_per_pixel(predictor, image)

    names = getattr(getattr(predictor, "metadata", None), "thing_classes", None)
    panels = {"detections": _draw_detections(rgb, detections, names, scale)}
    if record.fields:
        points = record.trace((location[0] * ratio[0], location[1] * ratio[1])) / ratio
        title = f"{len(points)} sampling locations of one activation"
        panels[title] = draw_sampling_points(rgb, points, location, scale)
    if record.pool_feature is not None and best is not None:
        boxes, box_ratio = best.pred_boxes.tensor, torch.tensor(ratio * 2)
        bins = record.part_bins(boxes * box_ratio, best.pred_classes) / box_ratio
        title = f"{bins.shape[1]} x {bins.shape[2]} bins of the most confident detection"
        panels[title] = draw_part_bins(rgb, boxes, bins, scale)
    return found, _put_side_by_side(panels)


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


def _network_pixels_per_pixel(
    predictor: DefaultPredictor, image: np.ndarray
) -> tuple[float, float]:
    """How ``DefaultPredictor`` resizes a picture, (x, y)."""
    corner = np.array([[image.shape[1], image.shape[0]]], dtype=np.float64)
    x, y = (predictor.aug.get_transform(image).apply_coords(corner.copy()) / corner)[0].tolist()
    return x, y


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
