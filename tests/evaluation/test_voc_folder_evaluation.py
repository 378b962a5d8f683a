"""Figures of the VOC evaluator: worked out by hand, and beside Detectron2's own."""

import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_deform.evaluation import VOCFolderEvaluator

CLASSES = ("bird", "cat", "dog")  # the split has no bird
# Whole pixels, 1 to 10 and 31 to 40, both ends included: 10 x 10
FIRST, SECOND = (1, 1, 10, 10), (31, 31, 40, 40)
OBJECTS = {"a": [("cat", FIRST)], "b": [("cat", FIRST), ("dog", SECOND)]}
# Class, score and box in Detectron2's continuous coordinates; the overlap with the object behind it
DETECTIONS = {
    "a": [
        ("cat", 0.9, (0, 0, 10, 10)),  # 1
        ("cat", 0.8, (20, 20, 29, 29)),  # 0
        ("bird", 0.9, (0, 0, 10, 10)),  # no object of its class in the split
    ],
    "b": [
        ("cat", 0.7, (0, 0, 10, 7.2)),  # 0.72
        ("dog", 0.6, (30, 30, 40, 36.2)),  # 0.62
    ],
}


def write_xml(objects) -> str:
    boxes = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
        "<difficult>0</difficult><bndbox>"
        + "".join(
            f"<{tag}>{corner}</{tag}>"
            for tag, corner in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        )
        + "</bndbox></object>"
        for name, corners in objects
    )
    return f"<annotation><size><width>50</width><height>50</height></size>{boxes}</annotation>"


@pytest.fixture
def register(tmp_path):
    """Registers OBJECTS, or those given, as a VOC data set of a year."""
    names = []

    def run(year: int, objects=OBJECTS) -> str:
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
        for image_id, its_objects in objects.items():
            Image.new("RGB", (50, 50)).save(tmp_path / "JPEGImages" / f"{image_id}.jpg")
            (tmp_path / "Annotations" / f"{image_id}.xml").write_text(write_xml(its_objects))
        (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(objects))
        name = f"voc_of_a_test_{year}"
        register_pascal_voc(name, str(tmp_path), "test", year, CLASSES)
        names.append(name)
        return name

    yield run
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def evaluate(evaluator, detections=DETECTIONS) -> dict[str, float]:
    evaluator.reset()
    for image_id, found in detections.items():
        instances = Instances(
            (50, 50),
            pred_boxes=Boxes(torch.tensor([box for _, _, box in found]).reshape(-1, 4)),
            scores=torch.tensor([score for _, score, _ in found]),
            pred_classes=torch.tensor([CLASSES.index(name) for name, _, _ in found]),
        )
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


# Cats, best first: right, wrong, right at thresholds to .70. Precision at recalls .5, .5, 1 is
# 1, 1/2, 2/3 there, and the second cat is never found at the others.
# Dogs: the only one, found at .50, .55 and .60.
@pytest.mark.parametrize(
    ("year", "cats_found", "one_cat_found"),
    [
        (2012, 100 * (0.5 * 1 + 0.5 * 2 / 3), 100 * 0.5),
        (2007, 100 * (6 * 1 + 5 * 2 / 3) / 11, 100 * 6 / 11),  # recalls 0, .1, ... .5 and .6, ... 1
    ],
)
def test_by_hand(register, year, cats_found, one_cat_found) -> None:
    figures = evaluate(VOCFolderEvaluator(register(year)))
    cats = (5 * cats_found + 5 * one_cat_found) / 10
    assert figures == pytest.approx(
        {
            "AP": (cats + 30) / 2,
            "AP50": (cats_found + 100) / 2,
            "AP70": (cats_found + 0) / 2,
            "AP75": (one_cat_found + 0) / 2,
            "AP-cat": cats,
            "AP-dog": 30,
            "AP50-cat": cats_found,
            "AP50-dog": 100,
        }
    )
    assert list(figures)[:4] == ["AP", "AP50", "AP70", "AP75"]


@pytest.mark.parametrize("year", [2007, 2012])
def test_equals_detectron2s(register, year) -> None:
    """Many objects and noisy detections; every class has an object, so that its mean is defined."""
    generator = np.random.default_rng(year)
    objects, detections = {}, {}
    for image in range(12):
        objects[f"{image}"], detections[f"{image}"] = [], []
        for name in CLASSES[: 1 + image % 3]:
            x, y = generator.integers(1, 25, 2).tolist()
            width, height = generator.integers(8, 20, 2).tolist()
            objects[f"{image}"].append((name, (x, y, x + width, y + height)))
            for score in generator.uniform(0.05, 1, 2).tolist():
                noise = generator.normal(0, 1, 4)
                box = np.array([x - 1, y - 1, x + width, y + height]) + noise
                detections[f"{image}"].append((name, score, tuple(box.tolist())))
    name = register(year, objects)
    ours = evaluate(VOCFolderEvaluator(name), detections)
    theirs = evaluate(PascalVOCDetectionEvaluator(name), detections)
    assert 5 < theirs["AP75"] < theirs["AP50"] < 95
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
    assert ours["AP75"] < ours["AP70"] < ours["AP50"]
    for key in ("AP", "AP50"):
        of_classes = [ours[f"{key}-{label}"] for label in CLASSES]
        assert np.mean(of_classes) == pytest.approx(ours[key])


def test_one_class_is_the_mean(register) -> None:
    name = register(2012, {"a": [("cat", FIRST)]})
    figures = evaluate(VOCFolderEvaluator(name), {"a": [("cat", 0.9, (0, 0, 10, 10))]})
    assert figures == {"AP": 100, "AP50": 100, "AP70": 100, "AP75": 100}


def test_no_detections(register) -> None:
    figures = evaluate(VOCFolderEvaluator(register(2012)), {"a": [], "b": []})
    assert set(figures.values()) == {0.0} and len(figures) == 8


def test_table_in_the_log(register, caplog) -> None:
    evaluator = VOCFolderEvaluator(register(2012))
    logger = logging.getLogger("detectron2.evaluation.pascal_voc_evaluation")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=logger.name):
            evaluate(evaluator)
    finally:
        logger.removeHandler(caplog.handler)
    lines = [line.replace(" ", "") for line in caplog.text.splitlines()]
    assert "|category|AP|AP50|AP70|AP75|" in lines
    assert "|cat|66.667|83.333|83.333|50.000|" in lines
    assert "|dog|30.000|100.000|0.000|0.000|" in lines
