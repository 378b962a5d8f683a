"""PASCAL VOC 2012 for semantic segmentation, with SBD's label maps added.

```
<root>/VOC2012/JPEGImages/<id>.jpg
<root>/VOC2012/SegmentationClass/<id>.png         of VOC: colour-indexed
<root>/VOC2012/ImageSets/Segmentation/{train,val}.txt
<root>/VOC2012/SegmentationClassAug/<id>.png      made by tools/prepare_voc_aug.py: plain indices
<root>/VOC2012/ImageSets/Segmentation/trainaug.txt                                  made by it too
```

The pixels of VOC's own PNGs are indices into a palette. Detectron2's DatasetMapper asks Pillow for
grey values, which looks the colours up and turns class 1 (dark red) into 38, while its evaluator
reads the indices. So only SegmentationClassAug is used, for all splits, and a colour-indexed file
in it is refused.
"""

import importlib
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image
from tqdm import tqdm

IGNORE_LABEL = 255
STUFF_CLASSES = ("background", *CLASS_NAMES)
SPLITS = {"train": "train", "val": "val", "train_aug": "trainaug"}  # in names: of the list

__all__ = [
    "STUFF_CLASSES",
    "class_colours",
    "load_voc_sem_seg",
    "register_all_voc_sem_seg",
    "write_class_indices",
]


def register_all_voc_sem_seg(root: str) -> None:
    """Register voc_2012_sem_seg_{train,val,train_aug}: 1,464, 1,449 and 10,582 pictures.

    "train_aug" is what the paper trains on: the pictures of VOC 2012's "train" and of SBD's two
    lists that are not in VOC 2012's "val". The files need not be there yet.

    Args:
        root: the folder that holds VOC2012, `$DETECTRON2_DATASETS` for Detectron2's data sets.
    """
    dirname = os.path.join(root, "VOC2012")
    for name, split in SPLITS.items():
        name = f"voc_2012_sem_seg_{name}"
        DatasetCatalog.register(name, lambda split=split: load_voc_sem_seg(dirname, split))
        MetadataCatalog.get(name).set(
            stuff_classes=list(STUFF_CLASSES),
            stuff_colors=class_colours(),
            ignore_label=IGNORE_LABEL,
            dirname=dirname,
            split=split,
            evaluator_type="sem_seg",
        )


def load_voc_sem_seg(dirname: str, split: str) -> list[dict[str, Any]]:
    """Read one split into Detectron2's standard dictionaries.

    Args:
        dirname: the folder VOC2012.
        split: a file ImageSets/Segmentation/<split>.txt.

    Returns:
        One dictionary a picture: file_name, image_id, height, width, sem_seg_file_name (an 8-bit
        grey PNG: 0 background, 1 to 20 VOC's classes, 255 to be ignored).

    Raises:
        FileNotFoundError: the list, a picture or a label map is missing.
        ValueError: a label map is no 8-bit grey PNG.
    """
    records = []
    for image_id in _read_ids(_list_file(dirname, split)):
        picture = os.path.join(dirname, "JPEGImages", f"{image_id}.jpg")
        if not os.path.isfile(picture):
            raise FileNotFoundError(f"{picture} is missing; unpack all of PASCAL VOC 2012 there.")
        labels = os.path.join(dirname, "SegmentationClassAug", f"{image_id}.png")
        width, height = _check_label_map(labels)
        records.append(
            {
                "file_name": picture,
                "image_id": image_id,
                "height": height,
                "width": width,
                "sem_seg_file_name": labels,
            }
        )
    return records


def class_colours() -> list[list[int]]:
    """VOC's colours of the 21 classes, [red, green, blue] of 0 to 255 each.

    The bits of a class's number, three at a time from the lowest, are the red, green and blue bits
    from the highest.
    """
    return [
        [
            sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(8))
            for channel in range(3)
        ]
        for number in range(len(STUFF_CLASSES))
    ]


def write_class_indices(dirname: str, sbd: str | None = None) -> dict[str, int]:
    """Make SegmentationClassAug, and with SBD trainaug.txt, whole or not at all.

    VOC's own label map is taken where a picture has one, else SBD's. SBD has no pixels to be
    ignored; VOC's maps have 255 around every object.

    Args:
        dirname: the folder VOC2012, with SegmentationClass and ImageSets/Segmentation.
        sbd: SBD's folder benchmark_RELEASE/dataset, with cls/<id>.mat, train.txt and val.txt. None:
            only VOC's own label maps are made, enough for "train" and "val".

    Returns:
        Numbers: "train", "val", with SBD also "trainaug", of pictures in a list, and "label maps".

    Raises:
        FileExistsError: SegmentationClassAug is there, or another trainaug.txt. Nothing is changed.
        FileNotFoundError: a list or label map is missing. Nothing is changed.
        ImportError: SBD is given and SciPy is not installed.
        ValueError: a label map has other values than 0 to 20 and 255.
    """
    target = os.path.join(dirname, "SegmentationClassAug")
    if os.path.exists(target):
        raise FileExistsError(f"{target} exists; use it as it is, or remove it to make it anew.")
    splits = {split: _read_ids(_list_file(dirname, split)) for split in ("train", "val")}
    sources = {
        image_id: os.path.join(dirname, "SegmentationClass", f"{image_id}.png")
        for image_id in splits["train"] + splits["val"]
    }
    if sbd is not None:
        for split in ("train", "val"):
            for image_id in _read_ids(os.path.join(sbd, f"{split}.txt")):
                sources.setdefault(image_id, os.path.join(sbd, "cls", f"{image_id}.mat"))
        splits["trainaug"] = sorted(sources.keys() - set(splits["val"]))
        _check_same_list(_list_file(dirname, "trainaug"), splits["trainaug"])

    unfinished = tempfile.mkdtemp(prefix=".SegmentationClassAug.", dir=dirname)
    try:
        for image_id, source in tqdm(sorted(sources.items()), unit="map", mininterval=2.0):
            labels = Image.fromarray(_read_label_map(source))
            labels.save(os.path.join(unfinished, f"{image_id}.png"))
        os.chmod(unfinished, os.stat(dirname).st_mode)  # mkdtemp lets only its owner in
        if "trainaug" in splits:
            _write_list(_list_file(dirname, "trainaug"), splits["trainaug"])
        os.rename(unfinished, target)  # last: a run cut off before it can be repeated
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {**{split: len(ids) for split, ids in splits.items()}, "label maps": len(sources)}


def _list_file(dirname: str, split: str) -> str:
    return os.path.join(dirname, "ImageSets", "Segmentation", f"{split}.txt")


def _read_ids(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            ids = file.read().split()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; unpack PASCAL VOC 2012 and SBD, and for trainaug.txt run "
            "tools/prepare_voc_aug.py."
        ) from None
    if not ids:
        raise ValueError(f"{path} lists no picture; expected one id a line.")
    return ids


def _check_label_map(path: str) -> tuple[int, int]:
    """Width and height of a label map. Only the file's header is read."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; make it by tools/prepare_voc_aug.py.")
    with Image.open(path) as image:
        if image.mode != "L":
            raise ValueError(
                f"{path} has Pillow's mode '{image.mode}', expected 'L', 8-bit class indices: "
                "Detectron2 would train on its colours as grey values. Remove the folder and make "
                "it anew by tools/prepare_voc_aug.py."
            )
        return image.size


def _read_label_map(path: str) -> np.ndarray:
    """Class indices, uint8 (H, W), of one of VOC's PNGs or of SBD's .mat files."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; unpack PASCAL VOC 2012 and SBD completely.")
    try:
        labels = _read_mat(path) if path.endswith(".mat") else _read_indexed_png(path)
    except ImportError:
        raise
    except Exception as error:  # Pillow and SciPy have many kinds for a file that is damaged
        raise ValueError(
            f"{path} is no label map of VOC or SBD ({error}); unpack it anew."
        ) from None
    found = np.unique(labels)
    unknown = found[(found >= len(STUFF_CLASSES)) & (found != IGNORE_LABEL)]
    if unknown.size:
        raise ValueError(
            f"{path} has label {unknown[0]}; expected 0 to {len(STUFF_CLASSES) - 1} and "
            f"{IGNORE_LABEL}. Unpack it anew."
        )
    return labels


def _read_indexed_png(path: str) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"Pillow's mode is '{image.mode}', expected 'P'")
        return np.array(image)


def _read_mat(path: str) -> np.ndarray:
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ImportError(
            "SBD's files are read with SciPy, which is not installed: pip install scipy"
        ) from None
    return np.ascontiguousarray(loadmat(path)["GTcls"]["Segmentation"][0, 0], dtype=np.uint8)


def _check_same_list(path: str, ids: list[str]) -> None:
    """A list of the same pictures may be there, as many people bring theirs; no other."""
    if os.path.exists(path) and set(_read_ids(path)) != set(ids):
        raise FileExistsError(
            f"{path} exists and lists other pictures than VOC's and SBD's lists make; remove it."
        )


def _write_list(path: str, ids: list[str]) -> None:
    if os.path.exists(path):
        return
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.write("".join(f"{image_id}\n" for image_id in ids))
    os.replace(unfinished, path)
