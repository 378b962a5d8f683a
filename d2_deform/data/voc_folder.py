"""Reader of any folder in the PASCAL VOC layout, and its registration in Detectron2.

```
<root>/JPEGImages/<id>.jpg | .jpeg | .png
<root>/Annotations/<id>.xml
<root>/ImageSets/Main/<split>.txt          one <id> a line
```

Detectron2's own `load_voc_instances` serves the one data set it was written for. This reader gives
the same dictionaries for it, and answers every flaw that a person's own folder may have with one
line that names the file and the box.
"""

import difflib
import logging
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import cache
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import ExifTags, Image

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
CONFIG_PREFIX = "voc_folder_"
_TURNED_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF: width and height change places

__all__ = [
    "collect_class_names",
    "list_splits",
    "load_voc_folder",
    "read_class_names",
    "register_voc_folder",
    "register_voc_folder_from_config",
]


def register_voc_folder(
    name: str,
    root: str,
    split: str,
    class_names: Sequence[str] | None = None,
    skip_difficult: bool = False,
) -> None:
    """Register one split of a folder in PASCAL VOC layout under a name of the user's.

    The metadata carry what Detectron2's own VOC and COCO evaluators ask for. `evaluator_type` is
    "voc_folder": the plugin's trainer then takes `d2_deform.evaluation.VOCFolderEvaluator`, which
    forgives more. With a trainer of another's, set it to "pascal_voc" or "coco".

    Args:
        name: the data set's name in `cfg.DATASETS.TRAIN` and `.TEST`.
        root: the folder that holds JPEGImages, Annotations and ImageSets.
        split: a file ImageSets/Main/<split>.txt.
        class_names: the classes in the order of their ids; None collects them from the XML of all
            splits, in sorted order (which reads the XML now).
        skip_difficult: leave boxes marked difficult out of the dictionaries. Meant for training;
            the evaluator reads them again, because VOC neither rewards nor punishes them.

    Raises:
        FileNotFoundError: the folder or the split is missing.
        ValueError: an XML file read for its classes is broken.
    """
    root = os.path.abspath(os.path.expanduser(root))
    _split_file(root, split)
    names = list(class_names) if class_names is not None else collect_class_names(root)
    DatasetCatalog.register(name, lambda: load_voc_folder(root, split, names, skip_difficult))
    MetadataCatalog.get(name).set(
        thing_classes=names,
        dirname=root,
        split=split,
        year=2012,
        evaluator_type="voc_folder",
    )


def register_voc_folder_from_config(cfg: CfgNode) -> tuple[list[str], list[str]]:
    """Register every split of the folder that a config names, as "voc_folder_<split>".

    Reads `DATASETS.VOC_FOLDER`: `.ROOT` (empty: nothing to do), `.CLASSES_FILE` (one class a line;
    empty: the classes are collected from the XML) and `.SKIP_DIFFICULT`. Calling it again replaces
    the earlier registration. Lists of one class (VOC's "cat_train.txt", lines "<id> 1") are passed
    over.

    Returns:
        The names registered, sorted, and the class names in the order of their ids.

    Raises:
        FileNotFoundError: the folder or a file that it needs is missing.
        ValueError: a file read for its classes is broken.
    """
    folder = cfg.DATASETS.VOC_FOLDER
    if not folder.ROOT:
        return [], []
    root = os.path.abspath(os.path.expanduser(folder.ROOT))
    splits = list_splits(root)
    if folder.CLASSES_FILE:
        class_names = read_class_names(os.path.expanduser(folder.CLASSES_FILE))
    else:
        class_names = collect_class_names(root)
    names = [CONFIG_PREFIX + split for split in splits]
    for name, split in zip(names, splits, strict=True):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_voc_folder(name, root, split, class_names, folder.SKIP_DIFFICULT)
    return names, class_names


def load_voc_folder(
    root: str, split: str, class_names: Sequence[str] | None = None, skip_difficult: bool = False
) -> list[dict[str, Any]]:
    """Read one split into Detectron2's standard dictionaries.

    Boxes are XYXY_ABS in pixels of the picture. As in Detectron2's `load_voc_instances`, the
    XML's 1-based inclusive corners become (xmin - 1, ymin - 1, xmax, ymax). Boxes without area
    (xmin = xmax or ymin = ymax in the XML: a stray click) are skipped with one warning a split.

    Args:
        root: the folder that holds JPEGImages, Annotations and ImageSets.
        split: a file ImageSets/Main/<split>.txt.
        class_names: accepted classes, in the order of their ids; None collects them.
        skip_difficult: leave out boxes marked difficult.

    Returns:
        One dictionary a picture: file_name, image_id, height, width, annotations (each with
        category_id, bbox, bbox_mode and difficult).

    Raises:
        FileNotFoundError: a folder, list, picture or XML file is missing.
        ValueError: a list, XML file or box is wrong. The line names file and box.
    """
    names = list(class_names) if class_names is not None else collect_class_names(root)
    pictures = _picture_files(root)
    dicts, empty_boxes = [], []
    for image_id in _read_ids(root, split):
        if image_id not in pictures:
            accepted = ", ".join(PICTURE_SUFFIXES)
            raise FileNotFoundError(
                f"{_split_file(root, split)} lists '{image_id}', but {_folder(root, 'JPEGImages')} "
                f"has no picture of that name ({accepted}); add it or take the id off the list."
            )
        record, empty = _read_record(root, image_id, pictures[image_id], names, skip_difficult)
        dicts.append(record)
        empty_boxes += empty
    if empty_boxes:
        _warn_once(
            f"{root}, split '{split}': skipped {len(empty_boxes)} box(es) without area, "
            f"the first in {empty_boxes[0]}."
        )
    return dicts


def list_splits(root: str) -> list[str]:
    """Names of the splits in ImageSets/Main, sorted, without VOC's lists of one class."""
    main = _folder(root, "ImageSets", "Main")
    splits = [
        entry[: -len(".txt")]
        for entry in sorted(os.listdir(main))
        if entry.endswith(".txt") and not _is_list_of_one_class(os.path.join(main, entry))
    ]
    if not splits:
        raise FileNotFoundError(
            f"{main} holds no list of pictures; write a file <split>.txt there, one id a line."
        )
    return splits


def read_class_names(path: str) -> list[str]:
    """Read class names from a text file, one a line; blank lines do not count."""
    names = [line.strip() for line in _read_text(path, "file of class names").splitlines()]
    names = [name for name in names if name]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} names a class twice: {', '.join(repeated)}; keep one of each.")
    if not names:
        raise ValueError(f"{path} names no class; write one class a line.")
    return names


def collect_class_names(root: str) -> list[str]:
    """Class names found in the XML files of all splits, sorted."""
    ids = sorted({image_id for split in list_splits(root) for image_id in _read_ids(root, split)})
    names = set()
    for image_id in ids:
        path = _xml_file(root, image_id)
        for place, obj in _objects(path, _parse(path)):
            names.add(_text(obj, "name", place))
    if not names:
        raise ValueError(
            f"No XML file of {root} holds an object, so it has no classes; "
            "annotate it, or name the classes in a file (DATASETS.VOC_FOLDER.CLASSES_FILE)."
        )
    return sorted(names)


def _read_record(
    root: str, image_id: str, picture: str, class_names: list[str], skip_difficult: bool
) -> tuple[dict[str, Any], list[str]]:
    """One picture's dictionary, and descriptions of its boxes without area."""
    path = _xml_file(root, image_id)
    tree = _parse(path)
    width, height = _picture_size(tree, path, picture)
    annotations, empty_boxes = [], []
    for place, obj in _objects(path, tree):
        name = _text(obj, "name", place)
        if name not in class_names:
            raise ValueError(f"{place}: unknown class. {_advise_class(name, class_names)}")
        corners = _read_corners(obj, place, width, height)
        if corners[0] == corners[2] or corners[1] == corners[3]:
            empty_boxes.append(f"{place}: {_show(corners)}")
            continue
        difficult = _read_flag(obj, "difficult", place)
        if difficult and skip_difficult:
            continue
        annotations.append(
            {
                "category_id": class_names.index(name),
                "bbox": [corners[0] - 1.0, corners[1] - 1.0, corners[2], corners[3]],
                "bbox_mode": BoxMode.XYXY_ABS,
                "difficult": difficult,
            }
        )
    record = {
        "file_name": picture,
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": annotations,
    }
    return record, empty_boxes


def _read_corners(obj: ET.Element, place: str, width: int, height: int) -> list[float]:
    """(xmin, ymin, xmax, ymax) as the XML has them: pixels, 1-based, inclusive."""
    box = obj.find("bndbox")
    if box is None:
        raise ValueError(f"{place}: no <bndbox>; give it one or delete the object.")
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(box, tag, place)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"{place}: <{tag}> is '{text}'; expected a number of pixels, counted from 1. "
                "Correct it or delete the object."
            )
        corners.append(value)
    xmin, ymin, xmax, ymax = corners
    if xmax < xmin or ymax < ymin:
        raise ValueError(
            f"{place}: box {_show(corners)} has its corners swapped; expected "
            "xmin <= xmax and ymin <= ymax. Swap them or delete the object."
        )
    if xmin > width or ymin > height or xmax < 1 or ymax < 1:
        raise ValueError(
            f"{place}: box {_show(corners)} lies outside the picture of {width} x {height} pixels; "
            "correct it or delete the object."
        )
    return corners


def _picture_size(tree: ET.Element, path: str, picture: str) -> tuple[int, int]:
    """Width and height in pixels, of the picture itself; the XML's must be the same if it has any.

    Only the picture's header is read. As Detectron2 turns pictures by their EXIF orientation, so
    does this.
    """
    try:
        with Image.open(picture) as image:
            width, height = image.size
            has_exif = "exif" in image.info  # else Pillow decodes a whole PNG to look for it
            orientation = image.getexif().get(ExifTags.Base.Orientation) if has_exif else None
    except OSError as error:
        raise ValueError(
            f"{picture} cannot be read as a picture ({error}); replace it or take its id off "
            "the list."
        ) from None
    if orientation in _TURNED_ORIENTATIONS:
        width, height = height, width
    try:
        given = [int(tree.findtext(f"size/{tag}", "")) for tag in ("width", "height")]
    except ValueError:
        return width, height
    if min(given) > 0 and given != [width, height]:
        raise ValueError(
            f"{path}: <size> is {given[0]} x {given[1]}, but {picture} has {width} x {height} "
            "pixels; correct or delete <size>, and see that the boxes fit the picture."
        )
    return width, height


def _objects(path: str, tree: ET.Element) -> list[tuple[str, ET.Element]]:
    """Every object of an XML file, with its place in words for messages."""
    return [
        (f"{path}, object {number} ('{obj.findtext('name', '').strip()}')", obj)
        for number, obj in enumerate(tree.findall("object"), start=1)
    ]


def _text(element: ET.Element, tag: str, place: str) -> str:
    text = element.findtext(tag, "").strip()
    if not text:
        raise ValueError(f"{place}: <{tag}> is missing or empty; fill it in or delete the object.")
    return text


def _read_flag(obj: ET.Element, tag: str, place: str) -> bool:
    """A flag that may be absent: 0 or 1."""
    text = obj.findtext(tag, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{place}: <{tag}> is '{text}'; expected 0 or 1, or leave the tag out.")
    return text == "1"


def _parse(path: str) -> ET.Element:
    try:
        tree = ET.parse(path).getroot()
    except (ET.ParseError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid XML ({error}); correct the file or take its id off the lists."
        ) from None
    if tree.tag != "annotation":
        raise ValueError(
            f"{path} is not a PASCAL VOC annotation: its root is <{tree.tag}>, expected "
            "<annotation>. Replace the file or take its id off the lists."
        )
    return tree


def _read_ids(root: str, split: str) -> list[str]:
    path = _split_file(root, split)
    lines = [line.strip() for line in _read_text(path, "list of pictures").splitlines()]
    ids = [line for line in lines if line]
    if not ids:
        raise ValueError(f"{path} lists no picture; write one id a line.")
    seen = set()
    for image_id in ids:
        stem, suffix = os.path.splitext(image_id)
        if suffix.lower() in (*PICTURE_SUFFIXES, ".xml"):
            raise ValueError(
                f"{path}: '{image_id}' has a file suffix; expected the bare id. Write '{stem}'."
            )
        if "/" in image_id or "\\" in image_id:
            raise ValueError(
                f"{path}: '{image_id}' is a path; expected the bare name of a picture that lies "
                "in JPEGImages itself."
            )
        if image_id in seen:
            raise ValueError(f"{path} lists '{image_id}' twice; keep one of them.")
        seen.add(image_id)
    return ids


def _is_list_of_one_class(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        words = file.readline().split()
    return len(words) == 2 and words[1] in ("-1", "0", "1")


def _picture_files(root: str) -> dict[str, str]:
    """Path of the picture of every id; a .jpg goes before a .jpeg before a .png."""
    folder = _folder(root, "JPEGImages")
    files: dict[str, str] = {}
    rank = {suffix: position for position, suffix in enumerate(PICTURE_SUFFIXES)}
    candidates = [
        (rank[suffix.lower()], entry, stem)
        for entry in os.listdir(folder)
        for stem, suffix in [os.path.splitext(entry)]
        if suffix.lower() in rank
    ]
    for _, entry, stem in sorted(candidates):
        files.setdefault(stem, os.path.join(folder, entry))
    return files


def _split_file(root: str, split: str) -> str:
    main = _folder(root, "ImageSets", "Main")
    path = os.path.join(main, split + ".txt")
    if not os.path.isfile(path):
        found = [entry[: -len(".txt")] for entry in os.listdir(main) if entry.endswith(".txt")]
        raise FileNotFoundError(
            f"{path} is missing; {main} has the splits: {', '.join(sorted(found)) or 'none'}."
        )
    return path


def _xml_file(root: str, image_id: str) -> str:
    path = os.path.join(_folder(root, "Annotations"), image_id + ".xml")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing, though ImageSets/Main lists '{image_id}'; add it (a picture "
            "without objects needs an XML file without <object>) or take the id off the list."
        )
    return path


def _folder(root: str, *parts: str) -> str:
    path = os.path.join(root, *parts)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"Folder {path} is missing; expected the PASCAL VOC layout: JPEGImages/, Annotations/ "
            f"and ImageSets/Main/ in {root}."
        )
    return path


def _read_text(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"The {what} {path} is missing; correct its path.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; save it as one.") from None


@cache
def _warn_once(message: str) -> None:
    """Training and evaluation read a split several times; one warning is enough."""
    logger.warning(message)


def _advise_class(name: str, class_names: list[str]) -> str:
    """What is accepted, and what was likely meant."""
    close = difflib.get_close_matches(name, class_names, n=1) or [
        known for known in class_names if known.lower() == name.lower()
    ]
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return f"Accepted: {', '.join(class_names)}.{guess} Correct the object or add its class."


def _show(corners: Sequence[float]) -> str:
    return "[" + ", ".join(f"{corner:g}" for corner in corners) + "]"
