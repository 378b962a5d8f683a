"""Figures of a prediction: what was found, and where the network looked."""

from collections.abc import Sequence

import numpy as np
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb

from d2_deform.visualization.drawing import draw_part_bins, draw_sampling_points
from d2_deform.visualization.panels import PANEL_SIDE, Row, arrange_panels
from d2_deform.visualization.prediction import (
    Location,
    SampledPrediction,
    predict_with_sampling,
)

__all__ = ["draw_offset_figure", "draw_prediction_figure", "predict_with_figure"]

MIN_WINDOW_SIDE = 32  # pixels of the picture, around a detection
BOX_COLOURS = (
    *("#00e5ff", "#ffea00", "#76ff03", "#ff4081", "#ff9100"),
    *("#7c9cff", "#1de9b6", "#e040fb", "#ff5252", "#ffffff"),
)


def draw_prediction_figure(
    predictor: DefaultPredictor,
    image: np.ndarray,
    confidence_threshold: float = 0.5,
    location: Location | None = None,
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
    location: Location | None = None,
) -> tuple[Instances, np.ndarray]:
    """Predicts once; as :func:`draw_prediction_figure`.

    Returns:
        The detections, on CPU, with those below the threshold; and the figure.
    """
    prediction = predict_with_sampling(predictor, image)
    detections = prediction.detections(confidence_threshold)
    rgb, scale = prediction.image, _scale(prediction)
    panels = {"detections": _draw_detections(prediction, detections, scale)}
    if prediction.record.fields:
        location = location or prediction.middle(confidence_threshold)
        points = prediction.trace(location)
        title = f"{len(points)} sampling locations of one activation"
        panels[title] = draw_sampling_points(rgb, points, location, scale)
    if prediction.has_part_bins and len(detections):
        best = detections[0]
        bins = prediction.part_bins(best)
        title = f"{bins.shape[1]} x {bins.shape[2]} bins of the most confident detection"
        panels[title] = draw_part_bins(rgb, best.pred_boxes.tensor, bins, scale)
    return prediction.detections(), arrange_panels([panels])


def draw_offset_figure(
    prediction: SampledPrediction,
    locations: Sequence[Location] = (),
    layers: int = 3,
    group: int = 0,
    confidence_threshold: float = 0.5,
    num_detections: int = 1,
) -> np.ndarray:
    """Draws where a network samples, right, beside where it would without its offsets, left.

    A row for each location: the sampling points (paper figure 6) and, in yellow, their convex hull.
    Then, of a detector with deformable (PS-)RoI pooling, a row for each of the most confident
    detections: its bins (paper figure 7).

    Args:
        prediction: from :func:`predict_with_sampling`.
        locations: (x, y) in pixels, of the activations; none: the middle of the most confident
            detection, or of the picture where nothing is found.
        layers: how many deformable convolutions to follow, from the last one.
        group: which deformable group's offsets to follow.
        confidence_threshold: detections below it are left out.
        num_detections: rows of detections, at most.

    Returns:
        uint8 picture, RGB.

    Raises:
        ValueError: there is nothing to draw: no deformable convolution, and no detection whose
            bins move.
    """
    rows: list[Row] = []
    if prediction.record.fields:
        for location in locations or [prediction.middle(confidence_threshold)]:
            rows.append(_draw_location(prediction, location, layers, group))
    if prediction.has_part_bins:
        detections = prediction.detections(confidence_threshold)
        for index in range(min(num_detections, len(detections))):
            rows.append(_draw_bins(prediction, detections[index]))
    if not rows:
        raise ValueError(
            "there is nothing to draw: the network has no deformable convolution, and no detection "
            f"scores {confidence_threshold} or more whose bins could be shown"
        )
    return arrange_panels(rows)


def _draw_location(
    prediction: SampledPrediction, location: Location, layers: int, group: int
) -> Row:
    image, scale = prediction.image, _scale(prediction)
    fields = prediction.record.fields[-layers:]
    at_rest = prediction.trace(location, layers, group, deformed=False)
    points = prediction.trace(location, layers, group)
    dilations = _list({one.name: str(one.layer.dilation[0]) for one in fields})
    effective = _list(
        {one.name: f"{prediction.effective_dilation(one, location, group):.1f}" for one in fields}
    )
    titles = [
        f"without offsets: {_describe(at_rest, image)}\ndilation: {dilations}",
        f"deformable: {_describe(points, image)}\neffective dilation: {effective}",
    ]
    return {
        title: draw_sampling_points(image, places, location, scale, outline=True)
        for title, places in zip(titles, (at_rest, points), strict=True)
    }


def _list(values: dict[str, str]) -> str:
    """Such as "res5a 2, res5b 2", of which lines are broken at commas only."""
    return ", ".join(f"{name} {value}".replace(" ", "\u00a0") for name, value in values.items())


def _describe(points: np.ndarray, image: np.ndarray) -> str:
    width, height = np.ptp(points, axis=0)
    outside = int(((points < 0) | (points > image.shape[1::-1])).any(axis=1).sum())
    text = f"{len(points)} points over {width:.0f} x {height:.0f} pixels"
    return f"{text}, {outside} outside" if outside else text


def _draw_bins(prediction: SampledPrediction, detection: Instances) -> Row:
    """The box and its surroundings, enlarged."""
    box = detection.pred_boxes.tensor.numpy()
    left, top, right, bottom = _surroundings(box[0], prediction.image)
    image = prediction.image[top:bottom, left:right]
    scale = PANEL_SIDE / max(image.shape[:2])
    corner = np.array([left, top, left, top])
    panels = {}
    for title, deformed in (("without offsets", False), ("deformable", True)):
        bins = prediction.part_bins(detection, deformed).numpy() - corner
        shape = f"{bins.shape[1]} x {bins.shape[2]} bins of {prediction.label(detection)}"
        panels[f"{title}: {shape}"] = draw_part_bins(image, box - corner, bins, scale)
    return panels


def _surroundings(box: np.ndarray, image: np.ndarray) -> tuple[int, int, int, int]:
    """A window around a box, (x1, y1, x2, y2), twice as long as the box's longer side."""
    middle = (box[:2] + box[2:]) / 2
    reach = max(*(box[2:] - box[:2]), MIN_WINDOW_SIDE / 2)
    height, width = image.shape[:2]
    left, top = np.floor((middle - reach).clip(0)).astype(int).tolist()
    right, bottom = np.ceil((middle + reach).clip(max=(width, height))).astype(int).tolist()
    return left, top, right, bottom


def _scale(prediction: SampledPrediction) -> float:
    return PANEL_SIDE / max(prediction.image.shape[:2])


def _draw_detections(
    prediction: SampledPrediction, detections: Instances, scale: float
) -> np.ndarray:
    """Boxes in one strong colour a class, each with its class and score."""
    labels = [prediction.label(detections[index]) for index in range(len(detections))]
    visualizer = Visualizer(prediction.image, scale=scale, font_size_scale=1.5)
    colours = [
        to_rgb(BOX_COLOURS[label % len(BOX_COLOURS)]) for label in detections.pred_classes.tolist()
    ]
    visualizer.overlay_instances(
        boxes=detections.pred_boxes, labels=labels, assigned_colors=colours
    )
    for box, colour in zip(detections.pred_boxes, colours, strict=True):
        visualizer.draw_box(box.tolist(), alpha=1.0, edge_color=colour)
    return visualizer.output.get_image()
