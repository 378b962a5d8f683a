"""The rows of the paper's tables 1 and 3: which network each is, and what the paper found.

Every row is the plain network of a method on a data set, with a few config keys of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DATA", "METHODS", "TABLES", "Metric", "Row", "Study", "find_study"]

METHODS = ("rfcn", "faster_rcnn", "category_aware_rpn", "deeplab")
DIGITS = ("digits", "digits_warp0", "digits_warp8")  # Deformed Digits, bent by 5, 0, 8 % of height
DATA = ("voc", "coco", "cityscapes", "voc_folder", *DIGITS)

# The paper's tables (arXiv 1703.06211), all of ResNet-101. DeepLab: mIoU on VOC 2012 val and on
# Cityscapes val; the others: mAP@0.5 and mAP@0.7 on VOC 2007 test. Table 1 gives DeepLab's three
# deformable layers 75.2 on VOC, table 3 gives the same network 75.3.
_PAPER_COLUMNS = {"deeplab": 0, "category_aware_rpn": 2, "faster_rcnn": 4, "rfcn": 6}
_PAPER: dict[int, dict[str, tuple[float | None, ...]]] = {
    1: {
        "plain": (69.7, 70.4, 68.0, 44.9, 78.1, 62.1, 80.0, 61.8),
        "dconv1": (73.9, 73.5, 73.5, 54.4, 78.6, 63.8, 80.6, 63.0),
        "dconv2": (74.8, 74.4, 74.3, 56.3, 78.5, 63.3, 81.0, 63.8),
        "dconv3": (75.2, 75.2, 74.5, 57.2, 78.6, 63.3, 81.4, 64.7),
        "dconv6": (74.8, 75.1, 74.6, 57.7, 78.7, 64.0, 81.5, 65.4),
    },
    3: {
        "plain": (69.7, 70.4, 68.0, 44.9, 78.1, 62.1, 80.0, 61.8),
        "dil4": (73.1, 71.9, 72.8, 53.1, 78.6, 63.1, 80.5, 63.0),
        "dil6": (73.6, 72.7, 73.6, 55.2, 78.5, 62.3, 80.2, 63.5),
        "dil8": (73.2, 72.4, 73.2, 55.1, 77.8, 61.8, 80.3, 63.2),
        "dconv3": (75.3, 75.2, 74.5, 57.2, 78.6, 63.3, 81.4, 64.7),
        "dpool": (None, None, None, None, 78.3, 66.6, 81.2, 65.0),
        "dconv3_dpool": (None, None, None, None, 79.3, 66.9, 82.6, 68.5),
    },
}
TABLES = tuple(_PAPER)

_CONFIGS = {
    ("rfcn", "voc"): "VOC-Ablation/rfcn_R_101.yaml",
    ("faster_rcnn", "voc"): "VOC-Ablation/faster_rcnn_R_101.yaml",
    ("category_aware_rpn", "voc"): "VOC-Ablation/category_aware_rpn_R_101.yaml",
    ("deeplab", "voc"): "VOC-Segmentation/deeplab_R_101.yaml",
    ("rfcn", "coco"): "COCO-Detection/rfcn_R_101.yaml",
    ("faster_rcnn", "coco"): "COCO-Detection/faster_rcnn_R_101.yaml",
    ("category_aware_rpn", "coco"): "COCO-Detection/category_aware_rpn_R_101.yaml",
    ("deeplab", "coco"): "COCO-Segmentation/deeplab_thin_R_50_dconv3.yaml",
    ("deeplab", "cityscapes"): "Cityscapes/deeplab_R_101.yaml",
    ("rfcn", "voc_folder"): "VOC-Folder/rfcn_thin_R_50_dconv3_dpool.yaml",
    ("faster_rcnn", "voc_folder"): "VOC-Folder/faster_rcnn_thin_R_50_dconv3_dpool.yaml",
    ("category_aware_rpn", "voc_folder"): "VOC-Folder/category_aware_rpn_thin_R_50_dconv3.yaml",
    **{
        (method, data): config
        for data in DIGITS
        for method, config in {
            "rfcn": "quickstart.yaml",
            "faster_rcnn": "Deformed-Digits/faster_rcnn_thin_R_18_dconv3_dpool.yaml",
            "category_aware_rpn": "Deformed-Digits/category_aware_rpn_thin_R_18_dconv3.yaml",
            "deeplab": "Deformed-Digits/deeplab_thin_R_18_dconv3.yaml",
        }.items()
    },
}

_NUM_LAYERS = "MODEL.DEFORM.NUM_LAYERS"
_DILATION = "MODEL.RESNETS.RES5_DILATION"
_POOLING: dict[str, tuple[str, Any, Any]] = {  # its key; rigid; deformable
    "rfcn": ("MODEL.RFCN.DEFORM_POOL", False, True),
    "faster_rcnn": ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "DeformRoIPool"),
}


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation, in percent.

    Attributes:
        name: as people call it.
        key: its name in Detectron2's results, "task/figure".
        paper_index: which of the paper's two figures of a method it is; None: neither.
    """

    name: str
    key: str
    paper_index: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: as the files of ``configs/`` are named, "dconv3_dpool"; "plain" for none of it.
        title: what a person reads.
        keys: the config keys that make the network from the study's config.
        paper: the paper's figure for each metric; None where it has none. Empty: a row of ours.
    """

    name: str
    title: str
    keys: Mapping[str, Any]
    paper: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Study:
    """One method on one data set.

    Attributes:
        method: of `METHODS`.
        data: of `DATA`.
        config: the file that all rows start from, relative to ``configs/``.
        metrics: what rows are compared by.
        paper_data: where the paper measured its figures.
        dilation: the plain network's in res5.
        options: KEY VALUE ... of all rows on top of the config.
    """

    method: str
    data: str
    config: str
    metrics: tuple[Metric, ...]
    paper_data: str
    dilation: int
    options: tuple[str, ...] = ()

    def rows(self, table: int) -> list[Row]:
        """The rows of table 1 or 3 as the paper has them, the plain network first.

        On Deformed Digits, table 3 goes on with rows that the paper has not: more dilations, and
        for Faster R-CNN a rigid pooling that averages as the deformable one does.
        """
        column = _PAPER_COLUMNS[self.method]
        rows = []
        for name, figures in _PAPER[table].items():
            if figures[column] is None:
                continue
            found = figures[column : column + 2]
            paper = tuple(
                None if metric.paper_index is None else found[metric.paper_index]
                for metric in self.metrics
            )
            rows.append(self._paper_row(name, paper))
        if self.data in DIGITS and table == 3:
            rows += self._rows_of_ours()
        return rows

    def arm(self, name: str, keys: Mapping[str, Any]) -> Row:
        """A row of one's own: the plain network with other keys, for example a wider one."""
        title = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in keys.items())
        return Row(name, f"{name}: {title}", {**self._plain_keys(), **keys})

    def reserved_keys(self) -> set[str]:
        """The config keys that rows differ in, which no option may set for all of them."""
        keys = {key for table in TABLES for row in self.rows(table) for key in row.keys}
        return keys | {"MODEL.DEFORM.NUM_LAYERS_PER_STAGE"}

    def _plain_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {_NUM_LAYERS: 0}
        if self.method in _POOLING:
            key, rigid, _ = _POOLING[self.method]
            keys[key] = rigid
        return keys

    def _paper_row(self, name: str, paper: tuple[float | None, ...]) -> Row:
        keys = self._plain_keys()
        if name == "plain":
            return Row(name, f"plain, dilation {self.dilation}", keys, paper)
        if name.startswith("dil"):
            in_paper = int(name.removeprefix("dil"))
            dilation = in_paper // 2 * self.dilation  # the paper's plain network has 2
            note = "" if dilation == in_paper else f" (the paper's {in_paper})"
            return self._dilated_row(dilation, note, paper)
        titles = []
        for part in name.split("_"):
            if part == "dpool":
                key, _, deformable = _POOLING[self.method]
                keys[key] = deformable
                titles.append("deformable RoI pooling")
            else:
                number = int(part.removeprefix("dconv"))
                keys[_NUM_LAYERS] = number
                titles.append(f"{number} deformable layer{'' if number == 1 else 's'}")
        return Row(name, " and ".join(titles), keys, paper)

    def _dilated_row(self, dilation: int, note: str, paper: tuple[float | None, ...] = ()) -> Row:
        keys = {**self._plain_keys(), _DILATION: dilation}
        return Row(f"dil{dilation}", f"dilation {dilation}{note}", keys, paper)

    def _rows_of_ours(self) -> list[Row]:
        rows = [self._dilated_row(dilation, "") for dilation in (2, 6)]
        if self.method == "faster_rcnn":
            keys = {**self._plain_keys(), _POOLING[self.method][0]: "ROIAlignV2"}
            rows.append(Row("align", "rigid RoI pooling that averages (RoIAlign)", keys))
        return rows


def find_study(method: str, data: str) -> Study:
    """The study of a method on a data set.

    Args:
        method: of `METHODS`.
        data: of `DATA`.

    Raises:
        ValueError: there is none, such as of detectors on Cityscapes.
    """
    if (method, data) not in _CONFIGS:
        known = [name for name in DATA if (method, name) in _CONFIGS]
        raise ValueError(
            f"{method} on {data}: there is no such study; accepted: {', '.join(known)}"
        )
    if method == "deeplab":
        cityscapes = data == "cityscapes"
        key = "sem_seg/IoU" if cityscapes else "sem_seg/mIoU"  # as their evaluators call it
        metrics: tuple[Metric, ...] = (Metric("mIoU", key, int(cityscapes)),)
        paper_data = "Cityscapes val" if cityscapes else "VOC 2012 val"
    else:
        strict = Metric("AP75", "bbox/AP75") if data == "coco" else Metric("AP70", "bbox/AP70", 1)
        metrics = (Metric("AP50", "bbox/AP50", 0), strict, Metric("AP", "bbox/AP"))
        paper_data = "VOC 2007 test"
    return Study(
        method=method,
        data=data,
        config=_CONFIGS[method, data],
        metrics=metrics,
        paper_data=paper_data,
        dilation=4 if data in DIGITS else 2,
        options=_data_options(method, data),
    )


def _data_options(method: str, data: str) -> tuple[str, ...]:
    """The data sets of Deformed Digits with another warp; all else has them in its config."""
    if data not in DIGITS[1:]:
        return ()
    labels = "_sem_seg" if method == "deeplab" else ""
    family = f"deformed_{data}{labels}"
    return (
        *("DATASETS.TRAIN", f"('{family}_train',)"),
        *("DATASETS.TEST", f"('{family}_test',)"),
    )
