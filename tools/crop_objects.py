#!/usr/bin/env python
"""Cut the objects out of detection data sets into a folder that classifiers learn from.

    python tools/crop_objects.py --output digits deformed_digits_train deformed_digits_val
    python tools/pretrain_classifier.py --num-gpus 0 \\
        --config-file configs/Image-Folder/classifier_thin_R_18.yaml \\
        DATASETS.IMAGE_FOLDER.ROOT digits

A data set named <name>_<split> becomes <output>/<split>/<class>/*.png, ImageNet's layout.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

import d2_deform.data  # noqa: F401  registers its data sets


def crop_objects(dataset_name: str, folder: str, margin: float = 0.1) -> int:
    """Writes every object's box as a picture of its own; crowds are left out.

    Args:
        dataset_name: registered in Detectron2, with boxes.
        folder: gets <class>/<image id>_<number>.png.
        margin: how much more than the box is taken at every side, in shares of its size.

    Returns:
        The number of pictures written.

    Raises:
        ValueError: the data set has no classes of objects.
    """
    records = DatasetCatalog.get(dataset_name)
    class_names = MetadataCatalog.get(dataset_name).get("thing_classes")
    if class_names is None:
        raise ValueError(f"{dataset_name} has no classes of objects; choose another data set.")
    count = 0
    for record in records:
        picture = Image.fromarray(read_image(record["file_name"], format="RGB"))
        for number, annotation in enumerate(record["annotations"]):
            if annotation.get("iscrowd"):
                continue
            x1, y1, x2, y2 = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            dx, dy = margin * (x2 - x1), margin * (y2 - y1)
            corners = (
                max(math.floor(x1 - dx), 0),
                max(math.floor(y1 - dy), 0),
                min(math.ceil(x2 + dx), picture.width),
                min(math.ceil(y2 + dy), picture.height),
            )
            class_folder = os.path.join(folder, class_names[annotation["category_id"]])
            os.makedirs(class_folder, exist_ok=True)
            picture.crop(corners).save(
                os.path.join(class_folder, f"{record['image_id']}_{number}.png")
            )
            count += 1
    return count


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("datasets", nargs="+", help="names of registered data sets")
    arguments = parser.parse_args(words)
    if os.path.exists(arguments.output):
        raise ValueError(f"{arguments.output} exists; name a folder that does not, or remove it.")
    for name in arguments.datasets:
        if name not in DatasetCatalog:
            raise ValueError(f"no data set named {name} is registered.")
    for name in arguments.datasets:
        folder = os.path.join(arguments.output, name.rpartition("_")[2])
        print(f"{name}: {crop_objects(name, folder)} pictures in {folder}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
