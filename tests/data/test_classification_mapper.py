"""ClassificationMapper: what it cuts out, exactly where that can be known."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from d2_deform.config import add_deform_config
from d2_deform.data.checked_mapper import UnreadablePicture
from d2_deform.data.classification_mapper import ClassificationMapper


@pytest.fixture
def record(tmp_path):
    """A picture of 4 x 6 pixels whose red counts the pixels and whose blue is 7."""
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[..., 0] = np.arange(24).reshape(4, 6)
    picture[..., 2] = 7
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    return {"file_name": str(path), "label": 3}


RED = torch.arange(24, dtype=torch.uint8).reshape(4, 6)


def test_the_middle_at_test(record):
    mapped = ClassificationMapper(False, crop_size=2, min_size_test=4)(record)
    assert (mapped["label"], mapped["image"].dtype) == (3, torch.uint8)
    assert torch.equal(mapped["image"][2], RED[1:3, 2:4])
    assert (mapped["image"][0] == 7).all()  # BGR
    rgb = ClassificationMapper(False, crop_size=2, min_size_test=4, image_format="RGB")(record)
    assert torch.equal(rgb["image"], mapped["image"].flip(0))


def test_the_shorter_side_is_resized_at_test(record):
    mapped = ClassificationMapper(False, crop_size=8, min_size_test=8)(record)
    assert mapped["image"].shape == (3, 8, 8)
    assert mapped["image"][2, 4, 4] in (14, 15)  # near the picture's middle


def test_random_parts_in_training(record):
    torch.manual_seed(0)
    mapper = ClassificationMapper(True, crop_size=3)
    images = [mapper(record)["image"] for _ in range(20)]
    assert {image.shape for image in images} == {(3, 3, 3)}
    assert len({tuple(image[2].flatten().tolist()) for image in images}) > 10
    rises = [int(image[2, 1, 2]) - int(image[2, 1, 0]) for image in images]
    assert min(rises) < 0 < max(rises)  # mirrored and not


def test_whole_pictures_in_training(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(picture).save(tmp_path / "square.png")
    mapper = ClassificationMapper(
        True, crop_size=4, min_crop_area=1.0, random_flip="none", image_format="RGB"
    )
    image = mapper({"file_name": str(tmp_path / "square.png"), "label": 0})["image"]
    assert torch.equal(image, torch.as_tensor(picture).permute(2, 0, 1))


def test_from_config(record):
    cfg = get_cfg()
    add_deform_config(cfg)
    cfg.INPUT.CLASSIFICATION.CROP_SIZE, cfg.INPUT.MIN_SIZE_TEST = 2, 4
    mapped = ClassificationMapper(cfg, is_train=False)(record)
    assert torch.equal(mapped["image"][2], RED[1:3, 2:4])


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_unreadable_pictures(content, record):
    path = record["file_name"]
    if content is None:  # cut off
        with open(path, "rb") as file:
            content = file.read()[:-40]
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(UnreadablePicture, match=r"a.png cannot be read as a picture \(.*; replace"):
        ClassificationMapper(False)(record)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"crop_size": 0}, "INPUT.CLASSIFICATION.CROP_SIZE: 0 given, accepted: 1 or more"),
        ({"min_crop_area": 0.0}, "INPUT.CLASSIFICATION.MIN_CROP_AREA: 0.0 given, accepted: above"),
        ({"random_flip": "both"}, "INPUT.RANDOM_FLIP: both given, accepted: one of horizontal, v"),
        ({"min_size_test": 200}, r"INPUT.MIN_SIZE_TEST: 200 given, accepted: .*CROP_SIZE \(224\)"),
    ],
)
def test_flawed_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassificationMapper(True, **kwargs)
