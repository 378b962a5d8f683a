"""PASCAL VOC evaluation of any folder in that layout, not only of PASCAL VOC itself."""

import os
import tempfile
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator

from d2_deform.data.voc_folder import load_voc_folder

__all__ = ["VOCFolderEvaluator"]


class VOCFolderEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator on annotations that the plugin's reader has checked.

    Detectron2's evaluator parses the XML once more by itself: it asks for <pose>, <truncated>,
    <difficult> and whole-numbered corners, counts a box without area as an object to be found,
    cannot take an id with a space in it, and gives 0 (or NaN) for a class that the split does not
    hold, which lowers the mean. Here the checked boxes are written to a temporary folder in the
    plain form that it reads, for the classes that have an object to be found; the metric itself is
    Detectron2's, so a clean folder gets the very same figures. Corners are rounded to whole pixels.

    Results: {"bbox": {"AP", "AP50", "AP75"}}, means over the classes of the split, in percent.
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
