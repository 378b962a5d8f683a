"""The reader of ImageNet's layout: what it lists, and what it says of flawed folders."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_deform.config import add_deform_config
from d2_deform.data.image_folder import load_image_folder, register_image_folder_from_config

NAMES = ("image_folder_train", "image_folder_val")


@pytest.fixture
def folder(tmp_path):
    for path in ("train/cat/b.jpg", "train/cat/a.png", "train/ant/x/deep.jpg", "val/ant/1.JPEG"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    (tmp_path / "train/cat/notes.txt").write_text("no picture")
    (tmp_path / "val/cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val/cat/2.jpg")
    yield tmp_path
    for name in NAMES:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def config(folder):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.DATASETS.IMAGE_FOLDER.ROOT = str(folder)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = NAMES[:1], NAMES[1:]
    return cfg


def test_lists_pictures_by_class(folder):
    assert load_image_folder(str(folder), "train") == [
        {"file_name": str(folder / path), "label": label}
        for path, label in [
            ("train/ant/x/deep.jpg", 0),
            ("train/cat/a.png", 1),
            ("train/cat/b.jpg", 1),
        ]
    ]


def test_registers_what_the_config_uses(folder):
    assert register_image_folder_from_config(config(folder)) == ["ant", "cat"]
    assert register_image_folder_from_config(config(folder)) == ["ant", "cat"]  # again
    metadata = MetadataCatalog.get("image_folder_val")
    assert (metadata.classes, metadata.evaluator_type) == (["ant", "cat"], "image_folder")
    assert [record["label"] for record in DatasetCatalog.get("image_folder_val")] == [0, 1]


@pytest.mark.parametrize("root, test", [("", NAMES[1:]), (None, ("deformed_digits_val",))])
def test_nothing_to_register(root, test, folder):
    cfg = config(folder if root is None else root)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), test
    assert register_image_folder_from_config(cfg) == []
    assert not set(NAMES) & set(DatasetCatalog.list())


def test_a_missing_folder(folder):
    cfg = config(folder)
    cfg.DATASETS.TEST = ("image_folder_test",)
    with pytest.raises(FileNotFoundError, match=r"Folder .*/test is missing; expected <split>/<cl"):
        register_image_folder_from_config(cfg)


def test_a_folder_without_classes(folder):
    (folder / "test").mkdir()
    cfg = config(folder)
    cfg.DATASETS.TEST = ("image_folder_test",)
    with pytest.raises(FileNotFoundError, match=r"/test holds no folder of a class; expected"):
        register_image_folder_from_config(cfg)


def test_an_empty_class(folder):
    (folder / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/train: Found no valid file for the classes dog"):
        load_image_folder(str(folder), "train")


@pytest.mark.parametrize(
    "split, message",
    [
        ("train", "image_folder_train has 1 class.es. that image_folder_val lacks: dog; give"),
        ("val", "image_folder_val has 1 class.es. that image_folder_train lacks: dog; give"),
    ],
)
def test_splits_of_different_classes(split, message, folder):
    (folder / split / "dog").mkdir()
    with pytest.raises(ValueError, match=message):
        register_image_folder_from_config(config(folder))
