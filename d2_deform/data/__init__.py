"""Data sets: Deformed Digits, VOC without difficult objects, VOC 2012 and COCO for segmentation,
any folder in PASCAL VOC's layout.

Importing this package registers all but the last in Detectron2; their files are looked for, or
made, when they are loaded.
"""

import os

from detectron2.data import DatasetCatalog

from d2_deform.data.coco_sem_seg import (
    load_coco_sem_seg,
    register_all_coco_sem_seg,
    register_coco_sem_seg,
)
from d2_deform.data.deformed_digits import (
    DeformedDigitsSettings,
    register_builtin_deformed_digits,
    register_deformed_digits,
    write_deformed_digits,
)
from d2_deform.data.pascal_voc import (
    register_all_pascal_voc_no_difficult,
    register_pascal_voc_no_difficult,
)
from d2_deform.data.voc_folder import (
    load_voc_folder,
    register_voc_folder,
    register_voc_folder_from_config,
)
from d2_deform.data.voc_sem_seg import load_voc_sem_seg, register_all_voc_sem_seg

__all__ = [
    "DeformedDigitsSettings",
    "load_coco_sem_seg",
    "load_voc_folder",
    "load_voc_sem_seg",
    "register_all_coco_sem_seg",
    "register_all_voc_sem_seg",
    "register_coco_sem_seg",
    "register_deformed_digits",
    "register_pascal_voc_no_difficult",
    "register_voc_folder",
    "register_voc_folder_from_config",
    "write_deformed_digits",
]

if "deformed_digits_train" not in DatasetCatalog:  # a reload of the module keeps them
    register_builtin_deformed_digits()
    _root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))  # as Detectron2's own
    register_all_pascal_voc_no_difficult(_root)
    register_all_voc_sem_seg(_root)
    register_all_coco_sem_seg(_root)
