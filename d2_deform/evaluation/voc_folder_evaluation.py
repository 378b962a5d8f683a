"""PASCAL VOC evaluation of any folder in that layout, not only of PASCAL VOC itself."""

import os
import tempfile
import xml.etree.ElementTree as ET
from collections import OrderedDict
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.utils import comm
from tabulate import tabulate  # type: ignore[import-untyped]

from d2_deform.data.voc_folder import load_voc_folder

__all__ = ["VOCFolderEvaluator"]

IOU_THRESHOLDS = range(50, 100, 5)  # in percent, as Detectron2's evaluator has them


class VOCFolderEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator on annotations that the plugin's reader has checked.

    Detectron2's evaluator parses the XML once more by itself: it asks for <pose>, <truncated>,
    <difficult> and whole-numbered corners, counts a box without area as an object to be found,
    cannot take an id with a space in it, and gives 0 (or NaN) for a class that the split does not
    hold, which lowers the mean. Here the checked boxes are written to a temporary folder in the
    plain form that it reads, for the classes that have an object to be found; the metric itself is
    Detectron2's, so a clean folder gets the very same figures. Corners are rounded to whole pixels.

    Results: ``{"bbox": {...}}``, in percent, each the mean over the classes of the split:

    - "AP": mean over the IoU thresholds .50, .55, ... .95; "AP50" and "AP75" at one of them, equal
      to Detectron2's.
    - "AP70": the second figure of the paper's VOC tables, which Detectron2 computes and drops.
    - "AP-<class>" and "AP50-<class>": "AP" and "AP50" of one class, where the split has several.
      The first is COCOEvaluator's key; the second is what PASCAL VOC reports. Detectron2 leaves
      keys with a hyphen out of its summary.

    A table in the log has AP, AP50, AP70 and AP75 of every class. The metric is the 11-point one
    where the metadata's ``year`` is 2007, else the area under the curve.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a data set whose metadata hold dirname, split and thing_classes, as
                `register_voc_folder`, `register_deformed_digits` and Detectron2's
                `register_pascal_voc` set them.

        Raises:
            ValueError: the split has no object that could be found.
        """
        meta = MetadataCatalog.get(dataset_name)
        if not os.path.isdir(meta.dirname):
            DatasetCatalog.get(dataset_name)  # made when it is first asked for
        records = load_voc_folder(meta.dirname, meta.split, meta.thing_classes)
        present = sorted(
            {
                annotation["category_id"]
                for record in records
                for annotation in record["annotations"]
                if not annotation["difficult"]
            }
        )
        if not present:
            raise ValueError(
                f"'{dataset_name}' has no object to be found in {meta.dirname}, split "
                f"'{meta.split}', so nothing can be evaluated; choose another split."
            )
        self._present_names = [meta.thing_classes[category_id] for category_id in present]
        self._class_of = {category_id: number for number, category_id in enumerate(present)}
        self._id_of = {record["image_id"]: str(n) for n, record in enumerate(records)}
        self._folder = tempfile.TemporaryDirectory(prefix="voc_folder_")
        self._write_checked_copy(records)

        checked_name = f"{dataset_name} (checked copy)"
        MetadataCatalog.get(checked_name).set(
            dirname=self._folder.name,
            split="checked",
            year=meta.year,
            thing_classes=[str(number) for number in range(len(present))],
        )
        super().__init__(checked_name)
        MetadataCatalog.remove(checked_name)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """As Detectron2's: `outputs[i]["instances"]` with pred_boxes, scores and pred_classes."""
        for given, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            classes = instances.pred_classes.tolist()
            kept = [index for index, label in enumerate(classes) if label in self._class_of]
            instances = instances[np.asarray(kept, dtype=np.int64)]
            for index, label in enumerate(kept):
                instances.pred_classes[index] = self._class_of[classes[label]]
            image_id = self._id_of[given["image_id"]]
            super().process([{"image_id": image_id}], [{"instances": instances}])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """The results in the form that the class documents; None on all processes but the first."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        metric = "11-point (VOC 2007)" if self._is_2007 else "area under the curve"
        self._logger.info(f"Evaluating {self._dataset_name} with the {metric} metric.")
        with tempfile.TemporaryDirectory(prefix="voc_folder_eval_") as folder:
            aps = {
                name: self._average_precisions(
                    number, [line for of_rank in gathered for line in of_rank[number]], folder
                )
                for number, name in enumerate(self._present_names)
            }

        def summarize(at_thresholds: list[np.ndarray]) -> dict[str, float]:
            by_iou = dict(zip(IOU_THRESHOLDS, np.mean(at_thresholds, axis=0).tolist(), strict=True))
            singles = {f"AP{percent}": by_iou[percent] for percent in (50, 70, 75)}
            return {"AP": float(np.mean(list(by_iou.values()))), **singles}

        results = summarize(list(aps.values()))
        if len(aps) > 1:
            of_class = {name: summarize([ap]) for name, ap in aps.items()}
            rows = [(name, *figures.values()) for name, figures in of_class.items()]
            table = tabulate(rows, headers=("category", *results), tablefmt="pipe", floatfmt=".3f")
            self._logger.info("Per-category bbox AP:\n" + table)
            for key in ("AP", "AP50"):
                results.update(
                    {f"{key}-{name}": figures[key] for name, figures in of_class.items()}
                )
        return OrderedDict(bbox=results)

    def _average_precisions(self, number: int, detections: list[str], folder: str) -> np.ndarray:
        """Of one class, in percent, at every IoU threshold; by Detectron2's function."""
        template = os.path.join(folder, "{}.txt")
        with open(template.format(number), "w") as file:
            file.write("\n".join(detections))
        return np.array(
            [
                100
                * voc_eval(
                    template,
                    self._anno_file_template,
                    self._image_set_path,
                    str(number),
                    ovthresh=percent / 100,
                    use_07_metric=self._is_2007,
                )[2]
                for percent in IOU_THRESHOLDS
            ]
        )

    def _write_checked_copy(self, records: list[dict[str, Any]]) -> None:
        for folder in ("Annotations", os.path.join("ImageSets", "Main")):
            os.makedirs(os.path.join(self._folder.name, folder))
        for record in records:
            path = os.path.join(
                self._folder.name, "Annotations", self._id_of[record["image_id"]] + ".xml"
            )
            ET.ElementTree(self._checked_xml(record)).write(path)
        with open(os.path.join(self._folder.name, "ImageSets", "Main", "checked.txt"), "w") as file:
            file.write("\n".join(self._id_of.values()))

    def _checked_xml(self, record: dict[str, Any]) -> ET.Element:
        root = ET.Element("annotation")
        for annotation in record["annotations"]:
            if annotation["category_id"] not in self._class_of:
                continue
            x1, y1, x2, y2 = annotation["bbox"]
            obj = ET.SubElement(root, "object")
            fields = {
                "name": self._class_of[annotation["category_id"]],
                "pose": "Unspecified",
                "truncated": 0,
                "difficult": int(annotation["difficult"]),
            }
            for tag, value in fields.items():
                ET.SubElement(obj, tag).text = str(value)
            box = ET.SubElement(obj, "bndbox")
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            for tag, corner in corners.items():
                ET.SubElement(box, tag).text = str(round(corner))
        return root
