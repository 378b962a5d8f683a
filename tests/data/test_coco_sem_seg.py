"""Label maps drawn from COCO's instance masks."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

from d2_deform.data.coco_sem_seg import load_coco_sem_seg, register_coco_sem_seg


def box(number, category, x, y, width, height, iscrowd=0):
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    mask = [corners]
    if iscrowd:  # COCO writes a crowd as run lengths, column by column
        area = np.zeros((12, 16), bool)
        area[y : y + height, x : x + width] = True
        changes = np.flatnonzero(np.diff(area.T.ravel().astype(int), prepend=0))
        ends = [0, *changes, area.size]
        mask = {"size": [12, 16], "counts": [int(n) for n in np.diff(ends)]}
    return {
        "id": number,
        "image_id": 7,
        "category_id": category,
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": iscrowd,
        "segmentation": mask,
    }


CATEGORIES = [
    {"id": 90, "name": "cup", "supercategory": "kitchen"},
    {"id": 3, "name": "table", "supercategory": "furniture"},
    {"id": 4, "name": "fork", "supercategory": "kitchen"},
]


@pytest.fixture
def json_file(tmp_path):
    content = {
        "images": [
            {"id": 7, "file_name": "seven.jpg", "height": 12, "width": 16},
            {"id": 9, "file_name": "nine.jpg", "height": 4, "width": 5},
        ],
        "categories": CATEGORIES,
        "annotations": [
            box(1, 90, 4, 4, 3, 3),  # on the table, but listed before it
            box(2, 3, 2, 2, 10, 8),
            box(3, 4, 0, 8, 16, 4, iscrowd=1),
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "by, classes, cup, table",
    [
        ("name", ["background", "table", "fork", "cup"], 3, 1),
        ("supercategory", ["background", "furniture", "kitchen"], 2, 1),
    ],
)
def test_small_objects_lie_on_large_ones_and_crowds_below(
    json_file, tmp_path, by, classes, cup, table
):
    records, names = load_coco_sem_seg(json_file, "pictures", by, str(tmp_path / "cache"))
    assert names == classes
    expected = np.zeros((12, 16), np.uint8)
    expected[8:] = 255
    expected[2:10, 2:12] = table
    expected[4:7, 4:7] = cup
    assert records[0]["file_name"] == os.path.join("pictures", "seven.jpg")
    assert (records[0]["height"], records[0]["width"]) == (12, 16)
    np.testing.assert_array_equal(
        read_image(records[0]["sem_seg_file_name"], "L")[..., 0], expected
    )
    assert not read_image(records[1]["sem_seg_file_name"], "L").any()


def test_maps_are_made_once_and_anew_for_another_file(json_file, tmp_path):
    cache = tmp_path / "cache"
    first, _ = load_coco_sem_seg(json_file, "", cache_dir=str(cache))
    made = os.stat(first[0]["sem_seg_file_name"]).st_mtime_ns
    again, _ = load_coco_sem_seg(json_file, "", cache_dir=str(cache))
    assert os.stat(again[0]["sem_seg_file_name"]).st_mtime_ns == made
    with open(json_file, "a") as file:
        file.write(" ")
    load_coco_sem_seg(json_file, "", cache_dir=str(cache))
    assert len(os.listdir(cache)) == 2
    assert all(not name.startswith(".") for name in os.listdir(cache))


def test_registered_classes_are_known_after_loading(json_file, tmp_path, monkeypatch):
    monkeypatch.setenv("D2_DEFORM_CACHE", str(tmp_path / "cache"))
    register_coco_sem_seg("coco_sem_seg_of_a_test", json_file, "pictures", by="supercategory")
    try:
        assert len(DatasetCatalog.get("coco_sem_seg_of_a_test")) == 2
        metadata = MetadataCatalog.get("coco_sem_seg_of_a_test")
        assert metadata.stuff_classes == ["background", "furniture", "kitchen"]
        assert metadata.evaluator_type == "sem_seg" and metadata.ignore_label == 255
    finally:
        DatasetCatalog.remove("coco_sem_seg_of_a_test")
        MetadataCatalog.remove("coco_sem_seg_of_a_test")


def test_errors(json_file, tmp_path):
    with pytest.raises(ValueError, match="by is 'colour'; expected 'name' or 'supercategory'"):
        register_coco_sem_seg("never", json_file, "", by="colour")
    with pytest.raises(FileNotFoundError, match=r"no\.json is missing"):
        load_coco_sem_seg(str(tmp_path / "no.json"), "")
    (tmp_path / "empty.json").write_text('{"images": [], "categories": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"empty\.json has 0 classes; expected 1 to 254"):
        load_coco_sem_seg(str(tmp_path / "empty.json"), "")
