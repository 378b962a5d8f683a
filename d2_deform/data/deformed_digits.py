"""Deformed Digits: a small data set of objects under unknown geometric transformation.

Handwritten digits, bent and scaled, on photographs (``deformed_digits_drawing``), in PASCAL VOC's
layout. Pictures are made when first asked for, into `$D2_DEFORM_CACHE` (default
~/.cache/d2_deform).
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from d2_deform.data.cache import find_cache_dir, whole_folder
from d2_deform.data.deformed_digits_drawing import (
    CLASS_NAMES,
    SPLITS,
    DeformedDigitsSettings,
    DigitBox,
    check_drawing_tools,
    draw_picture,
)
from d2_deform.data.voc_folder import load_voc_folder

GENERATOR_VERSION = 1  # goes into the folder's name: raise it whenever a picture would change
IGNORE_LABEL = 255
OTHER_WARPS = {"warp0": 0.0, "warp8": 0.08}  # beside the default of 0.05; "warp8" is 8 % of height

__all__ = [
    "DeformedDigitsSettings",
    "deformed_digits_folder",
    "load_deformed_digits",
    "register_builtin_deformed_digits",
    "register_deformed_digits",
    "write_deformed_digits",
]


def register_deformed_digits(
    name: str,
    split: str,
    num_images: int,
    seed: int = 0,
    *,
    cache_dir: str | None = None,
    evaluator_type: str = "pascal_voc",
    **settings: Any,
) -> None:
    """Register a Deformed Digits data set; pictures are made when it is first loaded.

    Args:
        name: the data set's name in `cfg.DATASETS.TRAIN` and `.TEST`.
        split: "train", "val" or "test": which source digits and regions of photographs to use.
        num_images: number of pictures. A smaller set holds the first pictures of a larger one.
        seed: another seed, other pictures.
        cache_dir: where the folder is made; default `$D2_DEFORM_CACHE`, read now.
        evaluator_type: "pascal_voc" or "coco" (boxes), "sem_seg" (label maps).
        **settings: any attribute of `DeformedDigitsSettings`, e.g. image_size=192, warp=0.05.

    Raises:
        ValueError: a setting out of range.
    """
    drawn = DeformedDigitsSettings(**settings)
    dirname = deformed_digits_folder(split, num_images, seed, drawn, cache_dir)
    cache_dir = os.path.dirname(dirname)
    DatasetCatalog.register(
        name, lambda: load_deformed_digits(split, num_images, seed, drawn, cache_dir)
    )
    MetadataCatalog.get(name).set(
        thing_classes=list(CLASS_NAMES),
        stuff_classes=["background", *CLASS_NAMES],
        ignore_label=IGNORE_LABEL,
        dirname=dirname,
        split=split,
        year=2012,
        evaluator_type=evaluator_type,
    )


def register_builtin_deformed_digits() -> None:
    """Register deformed_digits_{train,val,test}, and deformed_digits_sem_seg_* for label maps.

    Also the same with other strengths of the warp, deformed_digits_warp0_train and so on: the same
    digits at the same places of the same photographs, bent otherwise.
    """
    families: dict[str, dict[str, Any]] = {"deformed_digits": {}}
    for name, warp in OTHER_WARPS.items():
        families[f"deformed_digits_{name}"] = {"warp": warp}
    for family, settings in families.items():
        for split, num_images in {"train": 6000, "val": 500, "test": 1000}.items():
            register_deformed_digits(f"{family}_{split}", split, num_images, **settings)
            register_deformed_digits(
                f"{family}_sem_seg_{split}",
                split,
                num_images,
                evaluator_type="sem_seg",
                **settings,
            )


def load_deformed_digits(
    split: str,
    num_images: int,
    seed: int = 0,
    settings: DeformedDigitsSettings | None = None,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Detectron2's dictionaries of a data set, which is made first where it is not there yet.

    Returns:
        As `load_voc_folder`, with `sem_seg_file_name`: a grey PNG, 0 background, 1 + digit.
    """
    settings = settings or DeformedDigitsSettings()
    dirname = deformed_digits_folder(split, num_images, seed, settings, cache_dir)
    if not os.path.isdir(dirname):
        write_deformed_digits(dirname, split, num_images, seed, settings)
    dicts = load_voc_folder(dirname, split, CLASS_NAMES)
    for record in dicts:
        record["sem_seg_file_name"] = os.path.join(
            dirname, "SegmentationClass", record["image_id"] + ".png"
        )
    return dicts


def deformed_digits_folder(
    split: str,
    num_images: int,
    seed: int = 0,
    settings: DeformedDigitsSettings | None = None,
    cache_dir: str | None = None,
) -> str:
    """The folder of a data set in the cache. Its name changes with every setting."""
    settings = settings or DeformedDigitsSettings()
    _check_request(split, num_images, seed)
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()
    name = (
        f"deformed_digits_v{GENERATOR_VERSION}_{split}_{num_images}_seed{seed}"
        f"_size{settings.image_size}_warp{settings.warp:g}_{digest[:8]}"
    )
    return os.path.join(find_cache_dir(cache_dir), name)


def write_deformed_digits(
    dirname: str,
    split: str,
    num_images: int,
    seed: int = 0,
    settings: DeformedDigitsSettings | None = None,
    num_threads: int | None = None,
) -> None:
    """Make a data set in PASCAL VOC layout, whole or not at all.

    Args:
        dirname: the folder to make. If it exists, nothing happens.
        split: "train", "val" or "test".
        num_images: number of pictures, > 0.
        seed: >= 0.
        settings: how pictures are drawn.
        num_threads: threads that draw, default one a core up to 8. The files do not depend on it.
    """
    settings = settings or DeformedDigitsSettings()
    _check_request(split, num_images, seed)
    dirname = os.path.abspath(dirname)
    if os.path.isdir(dirname):
        return
    check_drawing_tools()  # told before anything is written
    with whole_folder(dirname) as unfinished:
        _write_files(unfinished, split, num_images, seed, settings, num_threads)


def _write_files(
    dirname: str,
    split: str,
    num_images: int,
    seed: int,
    settings: DeformedDigitsSettings,
    num_threads: int | None,
) -> None:
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main"):
        os.makedirs(os.path.join(dirname, folder))

    def write(index: int) -> None:
        _write_picture(dirname, f"{index:06d}", *draw_picture(split, seed, index, settings))

    pool = ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 8))
    try:
        for _ in tqdm(
            pool.map(write, range(num_images)),
            total=num_images,
            desc=f"Drawing Deformed Digits '{split}'",
            unit="picture",
            mininterval=2.0,
            disable=num_images <= 1000,
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    made_by = {"version": GENERATOR_VERSION, "split": split, "num_images": num_images, "seed": seed}
    _write_text(
        os.path.join(dirname, "settings.json"),
        json.dumps({**made_by, **asdict(settings)}, indent=2) + "\n",
    )
    _write_text(
        os.path.join(dirname, "ImageSets", "Main", split + ".txt"),
        "".join(f"{index:06d}\n" for index in range(num_images)),
    )


def _write_picture(
    dirname: str, image_id: str, picture: np.ndarray, labels: np.ndarray, digits: list[DigitBox]
) -> None:
    import cv2  # checked before; an optional requirement

    _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    _, png = cv2.imencode(".png", labels)
    for folder, suffix, data in [("JPEGImages", "jpg", jpeg), ("SegmentationClass", "png", png)]:
        with open(os.path.join(dirname, folder, f"{image_id}.{suffix}"), "wb") as file:
            file.write(data.tobytes())
    _write_text(
        os.path.join(dirname, "Annotations", image_id + ".xml"),
        _annotation_xml(image_id, picture.shape[1], picture.shape[0], digits),
    )


def _annotation_xml(image_id: str, width: int, height: int, digits: list[DigitBox]) -> str:
    """The annotation in VOC's fields; corners counted from 1, inclusive."""
    lines = [
        "<annotation>",
        "  <folder>deformed_digits</folder>",
        f"  <filename>{escape(image_id)}.jpg</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "  <segmented>1</segmented>",
    ]
    for digit in digits:
        x1, y1, x2, y2 = digit.box
        lines += [
            "  <object>",
            f"    <name>{CLASS_NAMES[digit.label]}</name>",
            "    <pose>Unspecified</pose>",
            "    <truncated>0</truncated>",
            f"    <occluded>{int(digit.occluded)}</occluded>",
            "    <difficult>0</difficult>",
            f"    <bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _check_request(split: str, num_images: int, seed: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is '{split}'; expected one of {', '.join(SPLITS)}.")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; expected 1 or more.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more.")
