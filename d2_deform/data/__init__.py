"""Data sets: Deformed Digits (registered here, made on demand) and any PASCAL-VOC-layout folder."""

from detectron2.data import DatasetCatalog

from d2_deform.data.deformed_digits import (
    DeformedDigitsSettings,
    register_builtin_deformed_digits,
    register_deformed_digits,
    write_deformed_digits,
)
from d2_deform.data.voc_folder import (
    load_voc_folder,
    register_voc_folder,
    register_voc_folder_from_config,
)

__all__ = [
    "DeformedDigitsSettings",
    "load_voc_folder",
    "register_deformed_digits",
    "register_voc_folder",
    "register_voc_folder_from_config",
    "write_deformed_digits",
]

if "deformed_digits_train" not in DatasetCatalog:  # a reload of the module keeps them
    register_builtin_deformed_digits()
