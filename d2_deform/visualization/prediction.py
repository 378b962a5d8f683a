"""What a network found in a picture and where it looked, in pixels of that picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_deform.visualization.drawing import check_picture
from d2_deform.visualization.sampling import OffsetField, SamplingRecord, record_sampling

__all__ = ["SampledPrediction", "predict_with_sampling"]

Location = tuple[float, float]


@dataclass
class SampledPrediction:
    """One picture's prediction; all locations and boxes are in its pixels, (x, y).

    Attributes:
        image: uint8 (H, W, 3), RGB.
        outputs: of the network.
        record: of its deformable layers, in pixels of the network's input.
        ratio: (x, y) pixels of the network's input per pixel.
        class_names: where they are known.
    """

    image: np.ndarray
    outputs: dict[str, Any]
    record: SamplingRecord
    ratio: tuple[float, float]
    class_names: list[str] | None = None

    def detections(self, confidence_threshold: float = 0.0) -> Instances:
        """Those of at least this score, the most confident first, on CPU; none of segmentation."""
        found = self.outputs.get("instances")
        if found is None:
            found = Instances(
                self.image.shape[:2],
                pred_boxes=Boxes(torch.zeros(0, 4)),
                scores=torch.zeros(0),
                pred_classes=torch.zeros(0, dtype=torch.int64),
            )
        found = found.to("cpu")
        found = found[found.scores >= confidence_threshold]
        return found[found.scores.argsort(descending=True, stable=True)]

    def middle(self, confidence_threshold: float = 0.0) -> Location:
        """Of the most confident detection, or of the picture where nothing is found."""
        detections = self.detections(confidence_threshold)
        if len(detections) == 0:
            return self.image.shape[1] / 2, self.image.shape[0] / 2
        x, y = detections[0].pred_boxes.get_centers()[0].tolist()
        return x, y

    def trace(
        self, location: Location, layers: int = 3, group: int = 0, deformed: bool = True
    ) -> np.ndarray:
        """See :meth:`SamplingRecord.trace`."""
        points = self.record.trace(self._to_network(location), layers, group, deformed)
        return points / np.array(self.ratio, dtype=points.dtype)

    def effective_dilation(self, field: OffsetField, location: Location, group: int = 0) -> float:
        """In cells of the layer's map, see :meth:`SamplingRecord.effective_dilation`."""
        return self.record.effective_dilation(field, self._to_network(location), group)

    @property
    def has_part_bins(self) -> bool:
        return self.record.pool_maps is not None

    def part_bins(self, detections: Instances, deformed: bool = True) -> Tensor:
        """Tensor[R, Ph, Pw, 4] of R detections, see :meth:`SamplingRecord.part_bins`."""
        ratio = torch.tensor(self.ratio * 2)
        boxes = detections.pred_boxes.tensor * ratio
        return self.record.part_bins(boxes, detections.pred_classes, deformed) / ratio

    def label(self, detection: Instances) -> str:
        """Such as "seven: 98%"."""
        number = int(detection.pred_classes)
        name = self.class_names[number] if self.class_names else str(number)
        return f"{name}: {float(detection.scores):.0%}"

    def _to_network(self, location: Location) -> Location:
        return location[0] * self.ratio[0], location[1] * self.ratio[1]


def predict_with_sampling(predictor: DefaultPredictor, image: np.ndarray) -> SampledPrediction:
    """Runs the network once on a picture and records what its deformable layers predict.

    A network that needs proposals made beforehand runs up to its backbone and finds nothing.

    Args:
        predictor: Detectron2's, with the model.
        image: uint8 (H, W, 3), BGR, as ``cv2.imread`` gives it.

    Raises:
        ValueError: the picture has another shape or type.
    """
    check_picture(image)
    model = predictor.model
    with record_sampling(model) as record:
        if getattr(model, "proposal_generator", model) is None:
            outputs = _run_backbone(predictor, image)
        else:
            outputs = predictor(image)
    names = getattr(getattr(predictor, "metadata", None), "thing_classes", None)
    return SampledPrediction(
        image=np.ascontiguousarray(image[:, :, ::-1]),
        outputs=outputs,
        record=record,
        ratio=_network_pixels_per_pixel(predictor, image),
        class_names=names,
    )


def _run_backbone(predictor: DefaultPredictor, image: np.ndarray) -> dict[str, Any]:
    if predictor.input_format == "RGB":
        image = image[:, :, ::-1]
    image = predictor.aug.get_transform(image).apply_image(image)
    tensor = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        predictor.model.backbone(predictor.model.preprocess_image([{"image": tensor}]).tensor)
    return {}


def _network_pixels_per_pixel(
    predictor: DefaultPredictor, image: np.ndarray
) -> tuple[float, float]:
    """How ``DefaultPredictor`` resizes a picture, (x, y)."""
    corner = np.array([[image.shape[1], image.shape[0]]], dtype=np.float64)
    x, y = (predictor.aug.get_transform(image).apply_coords(corner.copy()) / corner)[0].tolist()
    return x, y
