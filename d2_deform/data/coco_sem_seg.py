"""Label maps for semantic segmentation, drawn from the instance masks of a COCO-format file.

A map is made when its data set is first loaded, into `$D2_DEFORM_CACHE` (default
~/.cache/d2_deform). Objects are drawn from the largest to the smallest, so that a cup on a table is
seen; a crowd's region is to be ignored, where no object lies on it.
"""

import hashlib
import os
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from d2_deform.data.cache import find_cache_dir, whole_folder

IGNORE_LABEL = 255

__all__ = ["load_coco_sem_seg", "register_all_coco_sem_seg", "register_coco_sem_seg"]


def register_all_coco_sem_seg(root: str) -> None:
    """Register coco_2017_{train,val}_sem_seg (background and 80 categories) and
    coco_2017_{train,val}_sem_seg_super (background and 12 supercategories).

    Args:
        root: the folder that holds coco, `$DETECTRON2_DATASETS` for Detectron2's data sets.
    """
    for split in ("train", "val"):
        for suffix, by in (("", "name"), ("_super", "supercategory")):
            register_coco_sem_seg(
                f"coco_2017_{split}_sem_seg{suffix}",
                os.path.join(root, f"coco/annotations/instances_{split}2017.json"),
                os.path.join(root, f"coco/{split}2017"),
                by=by,
            )


def register_coco_sem_seg(name: str, json_file: str, image_root: str, by: str = "name") -> None:
    """Register a data set whose label maps are drawn from instance masks when it is first loaded.

    Its classes (`stuff_classes`) are known once it is loaded.

    Args:
        name: the data set's name in `cfg.DATASETS.TRAIN` and `.TEST`.
        json_file: instances in COCO's format, with masks.
        image_root: the folder with the pictures.
        by: "name": a class for each category; "supercategory": one for each of those.

    Raises:
        ValueError: `by` is neither.
    """
    if by not in ("name", "supercategory"):
        raise ValueError(f"by is {by!r}; expected 'name' or 'supercategory'.")

    def load() -> list[dict[str, Any]]:
        records, classes = load_coco_sem_seg(json_file, image_root, by)
        MetadataCatalog.get(name).set(stuff_classes=classes)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        ignore_label=IGNORE_LABEL,
        evaluator_type="sem_seg",
    )


def load_coco_sem_seg(
    json_file: str, image_root: str, by: str = "name", cache_dir: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Detectron2's dictionaries of a data set, whose label maps are made where they are missing.

    Args:
        json_file, image_root, by: see `register_coco_sem_seg`.
        cache_dir: where the maps' folder is; default `$D2_DEFORM_CACHE`.

    Returns:
        Dictionaries with file_name, image_id, height, width, sem_seg_file_name (an 8-bit grey PNG:
        0 background, 1 + the class's place in the second value less one, 255 to be ignored), and
        the names of the classes, "background" first, the others in the order of the categories'
        numbers.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no JSON in COCO's format, has no categories, or 255 classes or more.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file} is missing; it holds the masks.")
    try:
        coco = COCO(json_file)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{json_file} is no JSON in COCO's format ({type(error).__name__}: {error})."
        ) from error
    categories = sorted(coco.loadCats(coco.getCatIds()), key=lambda category: category["id"])
    names = list(dict.fromkeys(category[by] for category in categories))
    if not 0 < len(names) < IGNORE_LABEL:
        raise ValueError(f"{json_file} has {len(names)} classes; expected 1 to {IGNORE_LABEL - 1}.")
    labels = {category["id"]: 1 + names.index(category[by]) for category in categories}
    dirname = _write_maps(coco, labels, json_file, by, cache_dir)
    records = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "sem_seg_file_name": os.path.join(dirname, f"{image['id']}.png"),
        }
        for image in coco.loadImgs(sorted(coco.getImgIds()))
    ]
    return records, ["background", *names]


def draw_label_map(coco: COCO, image: dict[str, Any], labels: dict[int, int]) -> np.ndarray:
    """The label map of one picture, uint8 (H, W).

    Args:
        coco: the instances.
        image: the picture's entry there.
        labels: a category's number -> its label.
    """
    label_map = np.zeros((image["height"], image["width"]), np.uint8)
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
    for annotation in sorted(annotations, key=lambda a: (not a.get("iscrowd"), -a["area"])):
        label = IGNORE_LABEL if annotation.get("iscrowd") else labels[annotation["category_id"]]
        label_map[coco.annToMask(annotation).astype(bool)] = label
    return label_map


def _write_maps(
    coco: COCO, labels: dict[int, int], json_file: str, by: str, cache_dir: str | None
) -> str:
    """The folder with all maps of the file, which is made whole or not at all."""
    with open(json_file, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:16]
    dirname = os.path.join(find_cache_dir(cache_dir), f"coco_sem_seg_v1_{by}_{digest}")
    if not os.path.isdir(dirname):
        images = coco.loadImgs(coco.getImgIds())
        with whole_folder(dirname) as unfinished:
            for image in tqdm(images, desc="Drawing label maps", unit="map", mininterval=2.0):
                label_map = Image.fromarray(draw_label_map(coco, image, labels))
                label_map.save(os.path.join(unfinished, f"{image['id']}.png"))
    return dirname
