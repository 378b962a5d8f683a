"""tools/crop_objects.py: exact pixels of the boxes."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

NAME = "test_crop_objects_val"


@pytest.fixture
def pixels(tmp_path):
    """A data set of one picture, 12 x 12, with two boxes."""
    pixels = np.arange(432, dtype=np.uint16).astype(np.uint8).reshape(12, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
        for box, label in (([2.0, 1.0, 4.0, 5.0], 1), ([4.0, 6.0, 12.0, 10.0], 0))
    ]
    record = {"file_name": str(tmp_path / "picture.png"), "image_id": "p"}
    DatasetCatalog.register(NAME, lambda: [{**record, "annotations": annotations}])
    MetadataCatalog.get(NAME).thing_classes = ["cat", "dog"]
    yield pixels
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_boxes_with_a_margin(tool, pixels, tmp_path):
    assert tool("crop_objects").crop_objects(NAME, str(tmp_path / "out"), margin=0.25) == 2
    dog = np.asarray(Image.open(tmp_path / "out" / "dog" / "p_0.png"))
    cat = np.asarray(Image.open(tmp_path / "out" / "cat" / "p_1.png"))
    assert np.array_equal(dog, pixels[0:6, 1:5])  # whole pixels, 1.5 to 4.5
    assert np.array_equal(cat, pixels[5:11, 2:12])  # cut at the picture's edge


def test_command_line(tool, pixels, tmp_path, capsys):
    main = tool("crop_objects").main
    main(["--output", str(tmp_path / "out"), NAME])
    assert sorted(p.name for p in (tmp_path / "out" / "val").iterdir()) == ["cat", "dog"]
    assert f"{NAME}: 2 pictures in " in capsys.readouterr().out
    with pytest.raises(ValueError, match="out exists; name a folder that does not"):
        main(["--output", str(tmp_path / "out"), NAME])
    with pytest.raises(ValueError, match="no data set named nothing is registered"):
        main(["--output", str(tmp_path / "other"), "nothing"])
