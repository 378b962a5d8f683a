"""PASCAL VOC without difficult objects, on genuine pictures of 2012 and on a folder made here."""

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.pascal_voc import load_voc_instances
from PIL import Image

from d2_deform.data import register_pascal_voc_no_difficult
from d2_deform.evaluation import VOCFolderEvaluator

NAMES = [
    f"voc_{year}_{split}_no_difficult"
    for year in (2007, 2012)
    for split in ("trainval", "train", "val")
]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "datasets"
VOC2012 = Path(os.environ.get("DETECTRON2_DATASETS", SHARED)) / "VOC2012"
needs_voc = pytest.mark.skipif(not VOC2012.is_dir(), reason="VOC2012 is not here")


@pytest.fixture
def register():
    """Registers a folder under a free name, for one test."""
    name = "voc_of_a_test"

    def from_folder(dirname, split):
        register_pascal_voc_no_difficult(name, str(dirname), split, 2012)
        return name

    yield from_folder
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("name", NAMES)
def test_registered_as_detectron2s_own(name):
    assert name in DatasetCatalog
    ours = MetadataCatalog.get(name)
    theirs = MetadataCatalog.get(name.removesuffix("_no_difficult"))
    for key in ("thing_classes", "dirname", "year", "split", "evaluator_type"):
        assert getattr(ours, key) == getattr(theirs, key)


def difficult_flags(image_id):
    tree = ET.parse(VOC2012 / "Annotations" / f"{image_id}.xml")
    return [obj.findtext("difficult") == "1" for obj in tree.findall("object")]


@needs_voc
@pytest.mark.parametrize("split", ["trainval", "train", "val"])
def test_what_detectron2_reads_without_the_difficult(split, register):
    ours = DatasetCatalog.get(register(VOC2012, split))
    classes = MetadataCatalog.get("voc_2012_train").thing_classes
    theirs = load_voc_instances(str(VOC2012), split, classes)
    if split == "trainval":
        assert sum(len(record["annotations"]) for record in theirs) == 273
        assert sum(len(record["annotations"]) for record in ours) == 273 - 38
    for our, their in zip(ours, theirs, strict=True):
        for key in ("file_name", "image_id", "height", "width"):
            assert our[key] == their[key]
        flags = difficult_flags(our["image_id"])
        expected = [a for a, flag in zip(their["annotations"], flags, strict=True) if not flag]
        for annotation in our["annotations"]:
            assert annotation.pop("difficult") is False
        assert our["annotations"] == expected


@pytest.fixture
def folder(tmp_path):
    """Two pictures, "easy" with a cat, "hard" with a difficult dog alone."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    for image_id, name, difficult in (("easy", "cat", 0), ("hard", "dog", 1)):
        Image.new("RGB", (40, 50)).save(tmp_path / "JPEGImages" / f"{image_id}.jpg")
        (tmp_path / "Annotations" / f"{image_id}.xml").write_text(
            "<annotation><size><width>40</width><height>50</height></size><object>"
            f"<name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>3</xmin>"
            "<ymin>4</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>"
        )
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("easy\nhard\n")
    return tmp_path


def test_a_picture_with_difficult_objects_alone(folder, register):
    name = register(folder, "train")
    easy, hard = DatasetCatalog.get(name)
    assert easy["annotations"][0]["bbox"] == [2, 3, 20, 30]
    assert hard["annotations"] == []
    assert [r["image_id"] for r in get_detection_dataset_dicts(name)] == ["easy"]
    assert len(get_detection_dataset_dicts(name, filter_empty=False)) == 2


def test_evaluation_ignores_the_difficult(folder, register):
    evaluator = VOCFolderEvaluator(register(folder, "train"))
    assert list(evaluator._class_of) == [7]  # the cat; a dog has nothing to be found
