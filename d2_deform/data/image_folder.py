"""Reader of a folder of classified pictures in ImageNet's layout, and its registration.

```
<root>/<split>/<class>/<picture>.jpg | .png | ...
```

Which files are pictures, and the order of the classes (by name), are torchvision's ``ImageFolder``.
"""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

CONFIG_PREFIX = "image_folder_"

__all__ = ["load_image_folder", "register_image_folder", "register_image_folder_from_config"]


def load_image_folder(root: str, split: str) -> list[dict[str, Any]]:
    """Lists the pictures of one split. They are not opened.

    Returns:
        One dictionary a picture: file_name, and label, the number of its class.

    Raises:
        FileNotFoundError: the folder is missing or has no classes, or a class has no picture.
    """
    folder = _split_folder(root, split)
    try:
        samples = make_dataset(folder, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from None
    return [{"file_name": path, "label": label} for path, label in samples]


def register_image_folder(name: str, root: str, split: str) -> list[str]:
    """Registers one split of a folder under a name of the user's.

    Args:
        name: the data set's name in ``cfg.DATASETS.TRAIN`` and ``.TEST``.
        root: the folder that holds the splits' folders.
        split: a folder in it.

    Returns:
        The class names in the order of their numbers.

    Raises:
        FileNotFoundError: the folder is missing or holds no folder of a class.
    """
    root = os.path.abspath(os.path.expanduser(root))
    folder = _split_folder(root, split)
    try:
        class_names, _ = find_classes(folder)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no folder of a class; expected {split}/<class>/<picture>."
        ) from None
    DatasetCatalog.register(name, lambda: load_image_folder(root, split))
    MetadataCatalog.get(name).set(
        classes=class_names, dirname=folder, evaluator_type="image_folder"
    )
    return class_names


def register_image_folder_from_config(cfg: CfgNode) -> list[str]:
    """Registers every "image_folder_<split>" that a config trains or tests on.

    Calling it again replaces the earlier registration.

    Args:
        cfg: DATASETS.IMAGE_FOLDER.ROOT, TRAIN and TEST are read.

    Returns:
        The class names, which all of these splits share; empty where the config uses none.

    Raises:
        FileNotFoundError: a folder is missing or holds no folder of a class.
        ValueError: two splits have different classes.
    """
    if not cfg.DATASETS.IMAGE_FOLDER.ROOT:
        return []
    classes: dict[str, list[str]] = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name.startswith(CONFIG_PREFIX) and name not in classes:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            split = name.removeprefix(CONFIG_PREFIX)
            classes[name] = register_image_folder(name, cfg.DATASETS.IMAGE_FOLDER.ROOT, split)
    if not classes:
        return []
    (first, class_names), *others = classes.items()
    for other, other_names in others:
        _check_same_classes(first, class_names, other, other_names)
    return class_names


def _check_same_classes(
    one: str, one_classes: Sequence[str], other: str, other_classes: Sequence[str]
) -> None:
    for has, lacks, difference in (
        (one, other, sorted(set(one_classes) - set(other_classes))),
        (other, one, sorted(set(other_classes) - set(one_classes))),
    ):
        if difference:
            raise ValueError(
                f"{has} has {len(difference)} class(es) that {lacks} lacks: "
                f"{', '.join(difference[:5])}{', ...' if len(difference) > 5 else ''}; "
                "give both the same folders."
            )


def _split_folder(root: str, split: str) -> str:
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"Folder {folder} is missing; expected <split>/<class>/<picture> in {root}, "
            "such as train/cat/1.jpg."
        )
    return folder
