"""Effective dilation: how far apart trained deformable filters sample (paper section 4.2, table 2).

A filter's effective dilation is "the mean of the distances between all adjacent pairs of sampling
locations in the filter". What the paper leaves open is chosen here so:

- adjacent are taps beside and below each other, 12 pairs in a 3x3 filter, so that an undeformed
  filter's effective dilation is its dilation, exactly;
- the unit is a cell of the map that is sampled, as for a dilation;
- a filter is one output cell of a layer; the mean runs over its deformable groups, too;
- the factors of a modulated filter (DCNv2) do not count: a tap of no weight is where it is;
- filters are sorted by the smallest ground-truth box that their undeformed centre lies in; small is
  below 32**2 pixels of the original picture, large from 96**2 on, as COCO has it;
- filters with their centre in a crowd box and in no other, or beyond the picture, in the padding,
  are left out. A box marked difficult counts if the data set gives it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.structures import BoxMode
from torch import Tensor, nn
from torch.utils.data import DataLoader

from d2_deform.layers import OffsetConv2d
from d2_deform.visualization import SamplingRecord, record_sampling

__all__ = [
    "BIN_WIDTH",
    "FILTER_CLASSES",
    "SIZE_LIMITS",
    "Distribution",
    "LayerDilation",
    "build_loader_with_boxes",
    "classify_filters",
    "effective_dilation",
    "filter_centres",
    "measure_effective_dilation",
]

FILTER_CLASSES = ("small", "medium", "large", "background")
BACKGROUND = FILTER_CLASSES.index("background")
LEFT_OUT = -1
SIZE_LIMITS = (32.0, 96.0)  # COCO's, square roots of areas in pixels
BIN_WIDTH = 0.125  # cells, of the histograms
NUM_BINS = 1024  # the last one holds all that is farther


@dataclass
class Distribution:
    """Values seen so far: their number, mean, standard deviation and histogram.

    Attributes:
        count: how many.
        total, total_of_squares: sums, in float64.
        histogram: numbers of values; bin i is centred on ``i * BIN_WIDTH``.
    """

    count: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    def add(self, values: Tensor) -> None:
        """
        Args:
            values: finite, 0 or more; of any shape.
        """
        values = values.double().flatten()
        self.count += len(values)
        self.total += float(values.sum())
        self.total_of_squares += float(values.square().sum())
        bins = torch.floor(values / BIN_WIDTH + 0.5).clamp(max=NUM_BINS - 1).long()
        self.histogram += torch.bincount(bins, minlength=NUM_BINS).numpy()

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.total / self.count if self.count else float("nan")

    @property
    def std(self) -> float:
        """The population's; NaN without values."""
        if not self.count:
            return float("nan")
        return max(self.total_of_squares / self.count - self.mean**2, 0.0) ** 0.5


@dataclass
class LayerDilation:
    """The effective dilation of one layer's filters.

    Attributes:
        dilation: the layer's own, (y, x): what its undeformed filters have.
        by_class: their distribution for each of ``FILTER_CLASSES``.
    """

    dilation: tuple[int, int]
    by_class: dict[str, Distribution] = field(
        default_factory=lambda: {name: Distribution() for name in FILTER_CLASSES}
    )


def effective_dilation(
    offset: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The mean distance of adjacent sampling locations, for every filter of a map.

    Args:
        offset (Tensor[G, kh * kw, 2, H, W]): every group's every tap's displacement, (y, x), in
            cells.
        kernel_size: (kh, kw).
        dilation: (y, x), of the undeformed filter.

    Returns:
        float64 Tensor[H, W], in cells.

    Raises:
        ValueError: a kernel of one tap, which has no pair.
    """
    if kernel_size == (1, 1):
        raise ValueError("kernel_size: (1, 1) given; a filter of one tap has no distances.")
    taps = offset.double().unflatten(1, kernel_size)  # (G, kh, kw, 2, H, W)
    down, right = taps.diff(dim=1), taps.diff(dim=2)
    down[:, :, :, 0] += dilation[0]
    right[:, :, :, 1] += dilation[1]
    distances = [torch.linalg.vector_norm(step, dim=3).flatten(0, 2) for step in (down, right)]
    return torch.cat(distances).mean(dim=0)


def filter_centres(
    layer: nn.Conv2d,
    output_size: tuple[int, int],
    input_size: tuple[int, int],
    network_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Where a layer's undeformed filters have their centres.

    Args:
        layer: for its kernel, stride, padding and dilation.
        output_size: (Ho, Wo) of its output.
        input_size: (H, W) of its input map.
        network_size: (height, width) of the network's padded input picture.

    Returns:
        y of the Ho rows and x of the Wo columns, float64, in pixels of the network's input.
    """
    centres = []
    for axis in (0, 1):
        half_extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) / 2
        cells = torch.arange(output_size[axis], dtype=torch.float64) * layer.stride[axis]
        cells += half_extent - int(layer.padding[axis])
        # Layers round the sizes of maps up; a cell has a whole number of pixels.
        pixels_per_cell = max(round(network_size[axis] / input_size[axis]), 1)
        centres.append((cells + 0.5) * pixels_per_cell)
    return centres[0], centres[1]


def classify_filters(
    y: Tensor,
    x: Tensor,
    picture_size: tuple[int, int],
    boxes: Tensor,
    is_crowd: Tensor,
    size_limits: tuple[float, float] = SIZE_LIMITS,
) -> Tensor:
    """Sorts filters by the smallest box around their centres.

    Args:
        y (Tensor[H]), x (Tensor[W]): centres of the rows and columns of filters, in pixels.
        picture_size: (height, width), pixels.
        boxes (Tensor[n, 4]): (x1, y1, x2, y2) in pixels; the right and lower edges are outside.
        is_crowd (bool Tensor[n]): boxes around many objects, which have no size of their own.
        size_limits: where medium and large begin, square roots of areas in pixels.

    Returns:
        int64 Tensor[H, W]: the place in ``FILTER_CLASSES``; -1 for a filter to be left out.
    """
    boxes = boxes.double()
    rows = (boxes[:, 1] <= y[:, None]) & (y[:, None] < boxes[:, 3])  # (H, n)
    columns = (boxes[:, 0] <= x[:, None]) & (x[:, None] < boxes[:, 2])  # (W, n)
    inside = rows[:, None] & columns[None]  # (H, W, n)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = torch.where(inside & ~is_crowd, area, torch.inf)
    beyond_all = area.new_full((len(y), len(x), 1), torch.inf)
    smallest = torch.cat([area, beyond_all], dim=2).amin(dim=2)

    limits = torch.tensor(size_limits, dtype=torch.float64).square()
    classes = torch.bucketize(smallest, limits, right=True)
    no_object = smallest.isinf()
    classes[no_object] = BACKGROUND
    classes[no_object & (inside & is_crowd).any(dim=2)] = LEFT_OUT
    height, width = picture_size
    on_picture = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    classes[~on_picture] = LEFT_OUT
    return classes


class _MapperWithBoxes:
    """Detectron2's mapper of a test, and the picture's boxes: "boxes", "is_crowd".

    Boxes stay in pixels of the original picture, in which their sizes mean the same whatever
    INPUT.MIN_SIZE_TEST.
    """

    def __init__(self, mapper: DatasetMapper) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        annotations = record.get("annotations", [])
        corners = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
        ]
        return {
            **self.mapper(record),
            "boxes": torch.tensor(corners, dtype=torch.float64).reshape(-1, 4),
            "is_crowd": torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations]).bool(),
        }


def build_loader_with_boxes(cfg: CfgNode, max_images: int | None = None) -> DataLoader[Any]:
    """Loads the pictures of DATASETS.TEST one by one, as a test does, with their boxes.

    Args:
        cfg: DATASETS.TEST, INPUT, MODEL.LOAD_PROPOSALS and DATALOADER.NUM_WORKERS count.
        max_images: the first so many of all; None: all.

    Returns:
        A loader for :func:`measure_effective_dilation`. A picture has, beside what the model takes,
        "boxes" (float64 Tensor[n, 4], x1, y1, x2, y2) and "is_crowd" (bool Tensor[n]), in pixels
        of the original picture.

    Raises:
        ValueError: no data set, or none of the pictures has a box.
    """
    names = list(cfg.DATASETS.TEST)
    if not names:
        raise ValueError("DATASETS.TEST is empty; name the data set to measure on.")
    records = get_detection_dataset_dicts(
        names,
        filter_empty=False,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else None,
    )[:max_images]
    if not any(record.get("annotations") for record in records):
        raise ValueError(
            f"DATASETS.TEST: no picture of {', '.join(names)} has a box to sort filters by; name a "
            "data set with boxes."
        )
    topk = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST if cfg.MODEL.LOAD_PROPOSALS else None
    mapper = DatasetMapper(
        is_train=False,
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
        precomputed_proposal_topk=topk,
    )
    return build_detection_test_loader(
        records, mapper=_MapperWithBoxes(mapper), num_workers=cfg.DATALOADER.NUM_WORKERS
    )


def measure_effective_dilation(
    model: nn.Module,
    loader: Iterable[Any],
    size_limits: tuple[float, float] = SIZE_LIMITS,
) -> dict[str, LayerDilation]:
    """Runs a model over pictures and measures every deformable convolution of its backbone.

    Detectron2's ``inference_on_dataset`` runs it, and logs the time left.

    Args:
        model: any of Detectron2's meta-architectures with the plugin's layers in its backbone.
        loader: of :func:`build_loader_with_boxes`.
        size_limits: see :func:`classify_filters`.

    Returns:
        The layers by name ("res5c", as in the paper), in the order of their computation.

    Raises:
        ValueError: no deformable convolution; offsets that are not finite.
    """
    backbone = getattr(model, "backbone", nn.Module())
    if not any(isinstance(module, OffsetConv2d) for module in backbone.modules()):
        raise ValueError(
            "The network's backbone has no deformable convolution (MODEL.DEFORM.NUM_LAYERS 0), so "
            "there is nothing to measure; its filters are as far apart as their dilation."
        )
    model.eval()
    with record_sampling(model, every_layer=True) as record:
        meter = _Meter(record, size_limits)
        inference_on_dataset(model, loader, meter)
    return meter.layers


class _Meter(DatasetEvaluator):
    """Takes what each picture left in a record."""

    def __init__(self, record: SamplingRecord, size_limits: tuple[float, float]) -> None:
        self._record = record
        self._size_limits = size_limits
        self.layers: dict[str, LayerDilation] = {}

    def reset(self) -> None:
        self.layers = {}
        self._record.fields.clear()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Any) -> None:
        (picture,) = inputs
        height, width = picture["image"].shape[-2:]
        size = (picture["height"], picture["width"])
        for one in self._record.fields:
            layer = one.layer
            if not one.offset.isfinite().all():
                raise ValueError(
                    f"The offsets of {one.name} are not finite on {picture.get('file_name')}; "
                    "are the weights sound?"
                )
            kernel_size, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
            values = effective_dilation(one.offset, kernel_size, dilation)
            y, x = filter_centres(layer, one.output_size, one.input_size, self._record.input_size)
            classes = classify_filters(
                y * size[0] / height,
                x * size[1] / width,
                size,
                picture["boxes"],
                picture["is_crowd"],
                self._size_limits,
            )
            measured = self.layers.setdefault(one.name, LayerDilation(dilation))
            for place, class_name in enumerate(FILTER_CLASSES):
                measured.by_class[class_name].add(values[classes == place])
        self._record.fields.clear()


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]
