"""Sampling points and part bins on a picture."""

import cv2
import numpy as np
from torch import Tensor

__all__ = ["check_picture", "draw_part_bins", "draw_sampling_points"]

Colour = tuple[int, int, int]
SAMPLE_COLOUR: Colour = (235, 30, 40)
LOCATION_COLOUR: Colour = (40, 230, 90)
OUTLINE_COLOUR: Colour = (255, 225, 40)
OUTLINE_EDGE_COLOUR: Colour = (60, 50, 0)  # so that yellow shows on white, too
ROI_COLOUR: Colour = (40, 120, 255)


def draw_sampling_points(
    image: np.ndarray,
    points: np.ndarray,
    location: tuple[float, float],
    scale: float = 1.0,
    outline: bool = False,
) -> np.ndarray:
    """Draws sampling points in red and the location that they belong to in green.

    Args:
        image: uint8 (H, W, 3), RGB.
        points: (n, 2), (x, y) in pixels; those outside the picture are left out.
        location: (x, y) in pixels.
        scale: the result is so many times as large.
        outline: draw the convex hull of all points in yellow, their receptive field.

    Returns:
        A new uint8 picture, RGB.

    Raises:
        ValueError: an argument has another shape or type.
    """
    check_picture(image)
    _check_shape("points", np.asarray(points), ("n", 2))
    canvas = _enlarge(image, scale)
    radius = 0.006 * min(canvas.shape[:2])
    if outline:
        # OpenCV counts pixels from their centres, in int32, and cuts lines that leave the picture.
        hull = cv2.convexHull(np.asarray(points, dtype=np.float32) * scale - 0.5)
        line = [np.round(hull * 16).clip(-(2**26), 2**26).astype(np.int32)]
        for colour, width in ((OUTLINE_EDGE_COLOUR, 3.0), (OUTLINE_COLOUR, 1.0)):
            thickness = max(round(0.5 * width * radius), 1)
            cv2.polylines(canvas, line, True, colour, thickness, cv2.LINE_AA, shift=4)
    # Few places, as those without offsets are, are drawn larger.
    few = len(np.unique(np.round(np.asarray(points), 2), axis=0)) <= 100
    marks = canvas.copy()
    for x, y in points:
        if 0 <= x <= image.shape[1] and 0 <= y <= image.shape[0]:
            _draw_disc(marks, x * scale, y * scale, radius * (1.6 if few else 1), SAMPLE_COLOUR)
    canvas = cv2.addWeighted(marks, 0.75, canvas, 0.25, 0.0)
    x, y = location[0] * scale, location[1] * scale
    _draw_disc(canvas, x, y, 3.2 * radius, (255, 255, 255))
    _draw_disc(canvas, x, y, 2.4 * radius, LOCATION_COLOUR)
    return canvas


def draw_part_bins(
    image: np.ndarray, boxes: np.ndarray | Tensor, bins: np.ndarray | Tensor, scale: float = 1.0
) -> np.ndarray:
    """Draws boxes in blue and their moved bins in red.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes: (R, 4), (x1, y1, x2, y2) in pixels.
        bins: (R, Ph, Pw, 4), as :func:`part_bins` returns them.
        scale: the result is so many times as large.

    Returns:
        A new uint8 picture, RGB.

    Raises:
        ValueError: an argument has another shape or type.
    """
    check_picture(image)
    _check_shape("boxes", np.asarray(boxes), ("R", 4))
    _check_shape("bins", np.asarray(bins), ("R", "Ph", "Pw", 4))
    canvas = _enlarge(image, scale)
    thickness = max(round(0.004 * min(canvas.shape[:2])), 1)
    fill = canvas.copy()
    flat_bins = np.asarray(bins).reshape(-1, 4) * scale
    for corners in flat_bins:
        _draw_box(fill, corners, SAMPLE_COLOUR, cv2.FILLED)
    canvas = cv2.addWeighted(fill, 0.18, canvas, 0.82, 0.0)
    for corners in np.asarray(boxes).reshape(-1, 4) * scale:
        _draw_box(canvas, corners, ROI_COLOUR, 2 * thickness)
    for corners in flat_bins:
        _draw_box(canvas, corners, SAMPLE_COLOUR, thickness)
    return canvas


def check_picture(image: np.ndarray) -> None:
    """Raises a ValueError unless it is uint8 (H, W, 3) and not empty."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: {type(image).__name__} given, accepted: numpy uint8 (H, W, 3)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"image: {image.dtype} {image.shape} given, accepted: uint8 (H, W, 3), not empty"
        )


def _check_shape(name: str, array: np.ndarray, accepted: tuple[str | int, ...]) -> None:
    if array.ndim != len(accepted) or array.shape[-1] != accepted[-1]:
        raise ValueError(
            f"{name}: shape {array.shape} given, accepted: ({', '.join(map(str, accepted))})"
        )


def _enlarge(image: np.ndarray, scale: float) -> np.ndarray:
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)


def _draw_disc(canvas: np.ndarray, x: float, y: float, radius: float, colour: Colour) -> None:
    """A filled circle at a fractional place; OpenCV counts pixels from their centres."""
    centre = (round((x - 0.5) * 16), round((y - 0.5) * 16))
    cv2.circle(canvas, centre, max(round(radius * 16), 8), colour, -1, cv2.LINE_AA, shift=4)


def _draw_box(canvas: np.ndarray, corners: np.ndarray, colour: Colour, thickness: int) -> None:
    x1, y1, x2, y2 = (round(float(corner) - 0.5) for corner in corners)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness, cv2.LINE_AA)
