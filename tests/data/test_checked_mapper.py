"""A picture that cannot be read is named."""

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper

from d2_deform.data.checked_mapper import CheckedMapper, UnreadablePicture


@pytest.fixture
def mapper():
    return CheckedMapper(DatasetMapper(True, augmentations=[], image_format="BGR"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    cv2.imwrite(str(path), noise)
    return path


def test_a_sound_picture(mapper, picture):
    assert mapper({"file_name": str(picture)})["image"].shape == (3, 40, 50)


@pytest.mark.parametrize("kept, reason", [(0, "cannot identify"), (1500, "truncated")])
def test_a_broken_picture(mapper, picture, kept, reason):
    picture.write_bytes(picture.read_bytes()[:kept])
    with pytest.raises(
        UnreadablePicture, match=rf"a\.jpg cannot be read as a picture \(.*{reason}"
    ):
        mapper({"file_name": str(picture)})


def test_a_missing_label_map(mapper, picture, tmp_path):
    record = {"file_name": str(picture), "sem_seg_file_name": str(tmp_path / "a.png")}
    with pytest.raises(UnreadablePicture, match=r"a\.jpg or .*a\.png cannot .*No such file"):
        mapper(record)


def test_a_picture_of_another_size(mapper, picture):
    with pytest.raises(UnreadablePicture, match=r"a\.jpg cannot .*\(50, 40\), expect \(8, 9\)"):
        mapper({"file_name": str(picture), "width": 8, "height": 9})
