"""PASCAL VOC without its "difficult" objects, to train as the official release does."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from d2_deform.data.voc_folder import load_voc_folder

__all__ = ["register_all_pascal_voc_no_difficult", "register_pascal_voc_no_difficult"]


def register_pascal_voc_no_difficult(name: str, dirname: str, split: str, year: int) -> None:
    """Registers a split of PASCAL VOC whose objects marked difficult are left out.

    Else the dictionaries are those of Detectron2's ``load_voc_instances``, so that it can be
    trained on together with Detectron2's own VOC data sets. A picture with nothing but difficult
    objects stays, without annotations; Detectron2 drops it from training
    (DATALOADER.FILTER_EMPTY_ANNOTATIONS). The evaluator reads the difficult objects again, to
    neither reward nor punish them.

    Args:
        name: the data set's name in ``cfg.DATASETS.TRAIN``.
        dirname: the folder with Annotations, ImageSets and JPEGImages. It is read when the data
            set is.
        split: "train", "val", "trainval" or "test".
        year: 2007 or 2012, which chooses the metric.

    Raises:
        ValueError: the year is neither.
    """
    if year not in (2007, 2012):
        raise ValueError(f"year is {year}; expected 2007 or 2012.")
    DatasetCatalog.register(
        name, lambda: load_voc_folder(dirname, split, CLASS_NAMES, skip_difficult=True)
    )
    MetadataCatalog.get(name).set(
        thing_classes=list(CLASS_NAMES),
        dirname=dirname,
        year=year,
        split=split,
        evaluator_type="pascal_voc",
    )


def register_all_pascal_voc_no_difficult(root: str) -> None:
    """Registers voc_{2007,2012}_{trainval,train,val}_no_difficult.

    Args:
        root: the folder with VOC2007 and VOC2012.
    """
    for year in (2007, 2012):
        for split in ("trainval", "train", "val"):
            register_pascal_voc_no_difficult(
                f"voc_{year}_{split}_no_difficult", os.path.join(root, f"VOC{year}"), split, year
            )
