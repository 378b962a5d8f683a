"""Folders in PASCAL VOC layout: reading, registration, evaluation and messages."""

import os

import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from d2_deform.config import add_deform_config
from d2_deform.data import voc_folder
from d2_deform.data.voc_folder import load_voc_folder
from d2_deform.evaluation.voc_folder_evaluation import VOCFolderEvaluator

_DATASETS = os.environ.get(
    "DETECTRON2_DATASETS",
    os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data", "datasets"),
)
_BCCD = os.path.join(_DATASETS, "bccd")
needs_bccd = pytest.mark.skipif(not os.path.isdir(_BCCD), reason="the bccd data are not here")


def box_xml(name="cat", corners=(5, 6, 20, 30), extra=""):
    tags = "".join(
        f"<{tag}>{value}</{tag}>"
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{tags}</bndbox></object>"


def xml(*objects, size="<size><width>40</width><height>50</height></size>"):
    return f"<annotation>{size}{''.join(objects)}</annotation>"


class Folder:
    """A folder of 40 x 50 pictures in VOC layout, made for a test."""

    def __init__(self, root):
        self.root = str(root)
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / part).mkdir(parents=True)
        self._path = root

    def add(self, image_id, annotation, suffix=".jpg"):
        Image.new("RGB", (40, 50)).save(self._path / "JPEGImages" / (image_id + suffix))
        (self._path / "Annotations" / (image_id + ".xml")).write_text(annotation)
        return self

    def list(self, text, split="train"):
        (self._path / "ImageSets" / "Main" / (split + ".txt")).write_text(text)
        return self

    def remove(self, part):
        (self._path / part).unlink()
        return self


@pytest.fixture
def folder(tmp_path):
    voc_folder._warn_once.cache_clear()
    return Folder(tmp_path / "own")


@pytest.fixture
def name():
    """A free data set name, unregistered afterwards."""
    yield "folder_of_a_test"
    if "folder_of_a_test" in DatasetCatalog:
        DatasetCatalog.remove("folder_of_a_test")
    MetadataCatalog.pop("folder_of_a_test", None)


def test_reads_a_split_of_one_picture(folder):
    folder.add("a", xml(box_xml(), box_xml("dog", (1, 1, 40, 50)))).list("a\n")
    (record,) = load_voc_folder(folder.root, "train")
    assert (record["image_id"], record["width"], record["height"]) == ("a", 40, 50)
    assert record["file_name"] == os.path.join(folder.root, "JPEGImages", "a.jpg")
    assert [a["category_id"] for a in record["annotations"]] == [0, 1]
    assert [a["bbox"] for a in record["annotations"]] == [[4, 5, 20, 30], [0, 0, 40, 50]]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG"])
def test_accepted_pictures(folder, suffix):
    folder.add("a", xml(box_xml()), suffix).list("a")
    assert load_voc_folder(folder.root, "train")[0]["file_name"].endswith("a" + suffix)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_size_is_read_from_the_picture_where_the_xml_has_none(folder, size):
    folder.add("a", xml(box_xml(), size=size)).list("a")
    (record,) = load_voc_folder(folder.root, "train")
    assert (record["width"], record["height"]) == (40, 50)


def test_picture_without_objects_and_windows_line_ends(folder):
    folder.add("a", xml()).add("b b", xml(box_xml())).list("\ufeffa\r\n\r\nb b\r\n")
    records = load_voc_folder(folder.root, "train", ["cat"])
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [("a", 0), ("b b", 1)]


def test_boxes_without_area_are_skipped_with_one_warning(folder, caplog):
    folder.add("a", xml(box_xml(), box_xml("cat", (7, 7, 7, 9)))).list("a\nb")
    folder.add("b", xml(box_xml("cat", (7, 9, 8, 9))))
    for _ in range(2):
        records = load_voc_folder(folder.root, "train")
    assert [len(record["annotations"]) for record in records] == [1, 0]
    (warning,) = caplog.messages
    assert "skipped 2 box(es) without area" in warning
    assert "a.xml, object 2 ('cat'): [7, 7, 7, 9]" in warning


def test_difficult_boxes_can_be_left_out(folder):
    folder.add("a", xml(box_xml(extra="<difficult>1</difficult>"), box_xml())).list("a")
    flags = [a["difficult"] for a in load_voc_folder(folder.root, "train")[0]["annotations"]]
    assert flags == [True, False]
    records = load_voc_folder(folder.root, "train", skip_difficult=True)
    assert len(records[0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (xml(box_xml("cta")), r"object 1 \('cta'\): unknown class. Accepted: cat, dog. Did you "),
        (xml(box_xml("Dog")), "Did you mean 'dog'"),
        (xml("<object><name>cat</name></object>"), "no <bndbox>"),
        (xml(box_xml(), box_xml("")), r"object 2 \(''\): <name> is missing or empty"),
        (xml(box_xml(corners=(1, 2, "x", 9))), "<xmax> is 'x'; expected a number"),
        (xml(box_xml(corners=(1, 2, "nan", 9))), "<xmax> is 'nan'; expected a number"),
        (xml(box_xml(corners=(1, 2, "", 9))), "<xmax> is missing or empty"),
        (xml(box_xml(corners=(9, 2, 5, 9))), r"\[9, 2, 5, 9\] has its corners swapped"),
        (xml(box_xml(corners=(41, 2, 45, 9))), "lies outside the picture of 40 x 50"),
        (xml(box_xml(extra="<difficult>yes</difficult>")), "<difficult> is 'yes'; expected 0 or 1"),
        ("<annotation><object>", "is not valid XML"),
        ("", "is not valid XML"),
        ("<html></html>", "is not a PASCAL VOC annotation: its root is <html>"),
    ],
)
def test_flaw_of_an_annotation_is_one_line_that_names_the_file(folder, annotation, message):
    folder.add("a", annotation).list("a")
    with pytest.raises(ValueError, match=message) as raised:
        load_voc_folder(folder.root, "train", ["cat", "dog"])
    assert os.path.join("Annotations", "a.xml") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("", "lists no picture"),
        ("a.jpg", "has a file suffix; expected the bare id. Write 'a'"),
        ("../a", "is a path"),
        ("a\na", "lists 'a' twice"),
    ],
)
def test_flaw_of_a_list(folder, ids, message):
    folder.add("a", xml(box_xml())).list(ids)
    with pytest.raises(ValueError, match=message) as raised:
        load_voc_folder(folder.root, "train", ["cat"])
    assert "train.txt" in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("JPEGImages/a.jpg", "lists 'a', but .*JPEGImages has no picture of that name"),
        ("Annotations/a.xml", "a.xml is missing, though ImageSets/Main lists 'a'"),
        ("ImageSets/Main/train.txt", "has the splits: none"),
    ],
)
def test_missing_file(folder, missing, message):
    folder.add("a", xml(box_xml())).list("a").remove(missing)
    with pytest.raises(FileNotFoundError, match=message):
        load_voc_folder(folder.root, "train", ["cat"])


def test_missing_root_tells_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the PASCAL VOC layout"):
        load_voc_folder(str(tmp_path / "nowhere"), "train", ["cat"])


def test_unreadable_picture(folder):
    folder.add("a", xml(box_xml())).list("a")
    with open(os.path.join(folder.root, "JPEGImages", "a.jpg"), "w") as file:
        file.write("no picture")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as a picture"):
        load_voc_folder(folder.root, "train", ["cat"])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_size_is_that_of_the_picture_as_detectron2_reads_it(folder, suffix):
    """A picture that EXIF turns by 90 degrees is 50 x 40."""
    folder.add("a", xml(box_xml()), suffix).list("a")
    path = os.path.join(folder.root, "JPEGImages", "a" + suffix)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 50)).save(path, exif=exif)
    assert read_image(path).shape[:2] == (40, 50)
    with pytest.raises(
        ValueError, match=r"a\.xml: <size> is 40 x 50, but .*a\.\w+ has 50 x 40 pix"
    ):
        load_voc_folder(folder.root, "train", ["cat"])


def test_class_names_from_all_splits_or_a_file(folder, tmp_path):
    folder.add("a", xml(box_xml("zebra"))).list("a")
    folder.add("b", xml(box_xml("ant"))).list("b", "val")
    assert voc_folder.collect_class_names(folder.root) == ["ant", "zebra"]
    classes = tmp_path / "classes.txt"
    classes.write_text("zebra\n\nant\n")
    assert voc_folder.read_class_names(str(classes)) == ["zebra", "ant"]
    classes.write_text("ant\nant\n")
    with pytest.raises(ValueError, match="names a class twice: ant"):
        voc_folder.read_class_names(str(classes))
    with pytest.raises(FileNotFoundError, match="file of class names"):
        voc_folder.read_class_names(str(tmp_path / "none.txt"))


def _config(root, skip_difficult=False):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.DATASETS.VOC_FOLDER.ROOT = root
    cfg.DATASETS.VOC_FOLDER.SKIP_DIFFICULT = skip_difficult
    return cfg


def test_registers_every_split_of_a_config(folder):
    difficult = box_xml("dog", extra="<difficult>1</difficult>")
    folder.add("a", xml(box_xml(), difficult))
    folder.list("a").list("a", "val").list("a  1", "cat_train")
    assert voc_folder.register_voc_folder_from_config(_config("")) == ([], [])
    for skip_difficult, boxes in ((False, 2), (True, 1)):
        names, class_names = voc_folder.register_voc_folder_from_config(
            _config(folder.root, skip_difficult)
        )
        (record,) = DatasetCatalog.get("voc_folder_val")
        assert len(record["annotations"]) == boxes
    try:
        assert names == ["voc_folder_train", "voc_folder_val"]
        assert class_names == MetadataCatalog.get("voc_folder_val").thing_classes == ["cat", "dog"]
    finally:
        for each in names:
            DatasetCatalog.remove(each)
            MetadataCatalog.remove(each)


def _evaluate_perfect_predictions(evaluator, name, wrong=0):
    """Predict the ground truth itself, but for the first `wrong` boxes."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        annotations = record["annotations"][wrong:]
        wrong = max(0, wrong - len(record["annotations"]))
        instances = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.scores = torch.linspace(0.9, 0.5, len(annotations))
        labels = [a["category_id"] for a in annotations]
        instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def test_evaluator_forgives_what_detectron2s_does_not(folder, name):
    """No pose, fractions, an id with a space, no area, an absent class, a name with a slash."""
    folder.add("a a", xml(box_xml("cat/dog", (2.2, 3, 9.4, 20)), box_xml("ant", (7, 7, 7, 9))))
    folder.add("b", xml(box_xml("cat/dog"))).list("a a\nb")
    classes = ["ant", "cat/dog", "cow"]
    voc_folder.register_voc_folder(name, folder.root, "train", classes)
    evaluator = VOCFolderEvaluator(name)
    assert evaluator._dataset_name == f"{name} (checked copy)"  # what it logs
    result = _evaluate_perfect_predictions(evaluator, name)
    assert result["AP50"] == pytest.approx(100)
    assert result["AP75"] == pytest.approx(100)
    half = _evaluate_perfect_predictions(VOCFolderEvaluator(name), name, wrong=1)
    assert half["AP50"] == pytest.approx(50)


def test_evaluator_neither_rewards_nor_punishes_difficult_boxes(folder, name):
    hard, easy = box_xml(extra="<difficult>1</difficult>"), box_xml(corners=(30, 30, 39, 39))
    folder.add("a", xml(hard, easy)).list("a")
    voc_folder.register_voc_folder(name, folder.root, "train")
    for wrong in (0, 1):
        result = _evaluate_perfect_predictions(VOCFolderEvaluator(name), name, wrong)
        assert result["AP50"] == pytest.approx(100)


def test_evaluator_needs_an_object(folder, name):
    folder.add("a", xml()).list("a")
    voc_folder.register_voc_folder(name, folder.root, "train", ["cat"])
    with pytest.raises(ValueError, match="has no object to be found"):
        VOCFolderEvaluator(name)


@needs_bccd
@pytest.mark.parametrize(
    ("split", "pictures", "boxes"), [("train", 205, 2804), ("val", 87, 1137), ("test", 72, 945)]
)
def test_bccd(split, pictures, boxes):
    records = load_voc_folder(_BCCD, split)
    assert len(records) == pictures
    assert sum(len(record["annotations"]) for record in records) == boxes


@needs_bccd
def test_bccd_boxes_are_those_of_detectron2():
    classes = ["RBC", "WBC", "Platelets"]
    ours = load_voc_folder(_BCCD, "test", classes)
    for record in ours:
        for annotation in record["annotations"]:
            annotation.pop("difficult")
    assert ours == load_voc_instances(_BCCD, "test", classes)


@needs_bccd
def test_bccd_evaluators_agree_on_perfect_predictions(name, tmp_path):
    voc_folder.register_voc_folder(name, _BCCD, "test")
    for evaluator in (
        VOCFolderEvaluator(name),
        PascalVOCDetectionEvaluator(name),
        COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path)),
    ):
        assert _evaluate_perfect_predictions(evaluator, name)["AP50"] == pytest.approx(100)


@needs_bccd
def test_evaluator_gives_detectron2s_figures_on_a_clean_folder(name):
    voc_folder.register_voc_folder(name, _BCCD, "test")
    ours = _evaluate_perfect_predictions(VOCFolderEvaluator(name), name, wrong=300)
    detectron2s = _evaluate_perfect_predictions(PascalVOCDetectionEvaluator(name), name, wrong=300)
    assert {key: ours[key] for key in detectron2s} == pytest.approx(detectron2s)
    assert ours["AP50"] < 90
