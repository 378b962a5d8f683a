"""Deformed Digits: deterministic, held out, tightly labelled, written whole or not at all."""

import filecmp
import itertools
import os
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("sklearn")
pytest.importorskip("cv2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.utils.file_io import PathManager

from d2_deform.data import deformed_digits as dd
from d2_deform.data import deformed_digits_drawing as drawing

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "train"
    dd.write_deformed_digits(str(path), "train", NUM_IMAGES, seed=3)
    return path


def _all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_same_seed_gives_same_files_for_any_number_of_threads(folder, tmp_path):
    again = tmp_path / "again"
    dd.write_deformed_digits(str(again), "train", NUM_IMAGES, seed=3, num_threads=1)
    files = _all_files(folder)
    assert _all_files(again) == files
    assert len(files) == 3 * NUM_IMAGES + 2
    assert filecmp.cmpfiles(folder, again, files, shallow=False)[0] == files


def test_picture_depends_on_seed_index_and_split():
    first = drawing.draw_picture("train", 0, 0)[0]
    assert np.array_equal(first, drawing.draw_picture("train", 0, 0)[0])
    for arguments in [("train", 1, 0), ("train", 0, 1), ("val", 0, 0)]:
        assert not np.array_equal(first, drawing.draw_picture(*arguments)[0])


def test_no_source_digit_is_shared_by_two_splits():
    sources = [drawing.source_digits(split) for split in drawing.SPLITS]
    assert sorted(itertools.chain(*sources)) == list(range(1797))
    for split in drawing.SPLITS:
        drawn = {
            digit.source for index in range(3) for digit in drawing.draw_picture(split, 0, index)[2]
        }
        assert drawn <= set(drawing.source_digits(split))


def test_no_region_of_a_photograph_is_shared_by_two_splits():
    shares = [drawing._REGION_SHARES[split] for split in drawing.SPLITS]
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(shares))
    widths = [drawing._sources(split).regions[0].shape[1] for split in drawing.SPLITS]
    assert sum(widths) == 640


def test_boxes_are_tight_around_the_label_map():
    for index in range(20):
        picture, labels, digits = drawing.draw_picture("val", 0, index)
        assert picture.shape == (192, 192, 3)
        assert labels.shape == (192, 192)
        assert 2 <= len(digits) <= 5
        inside = np.zeros_like(labels, dtype=bool)
        for digit in digits:
            x1, y1, x2, y2 = digit.box
            inside[y1:y2, x1:x2] = True
            ink = labels[y1:y2, x1:x2] == digit.label + 1
            for border in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
                assert border.any()
        assert not labels[~inside].any()


def test_ink_stands_out_from_what_lies_around():
    for index in range(10):
        picture, labels, digits = drawing.draw_picture("test", 0, index)
        grey = picture.astype(float).mean(axis=2)
        for digit in digits:
            x1, y1, x2, y2 = digit.box
            ink = labels[y1:y2, x1:x2] == digit.label + 1
            paper = labels[y1:y2, x1:x2] == 0
            if paper.sum() > 20:
                patch = grey[y1:y2, x1:x2]
                assert abs(np.median(patch[ink]) - np.median(patch[paper])) > 10


def test_heights_span_the_range():
    settings = dd.DeformedDigitsSettings(rotation=0, shear=0, aspect=0, warp=0, max_overlap=0)
    boxes = [
        digit.box
        for index in range(60)
        for digit in drawing.draw_picture("train", 0, index, settings)[2]
    ]
    heights = np.array([y2 - y1 for _, y1, _, y2 in boxes])
    assert 13 <= heights.min() <= 20
    assert 105 <= heights.max() <= 134


def test_loaded_dictionaries_agree_with_the_files(folder, tmp_path):
    settings = dd.DeformedDigitsSettings(image_size=96, max_digits=3)
    records = dd.load_deformed_digits("test", 3, 1, settings, str(tmp_path))
    assert len(records) == 3
    for record in records:
        assert Image.open(record["file_name"]).size == (96, 96)
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        seen = {annotation["category_id"] + 1 for annotation in record["annotations"]}
        assert set(np.unique(labels)) == seen | {0}


def test_detectron2_reads_the_same_boxes(folder):
    ours = dd.load_voc_folder(str(folder), "train", drawing.CLASS_NAMES)
    with_detectron2 = load_voc_instances(str(folder), "train", drawing.CLASS_NAMES)
    for one, other in zip(ours, with_detectron2, strict=True):
        for annotation in one["annotations"]:
            annotation.pop("difficult")
        assert one == other


def test_builtin_names_are_registered_without_drawing():
    for split, count in {"train": 6000, "val": 500, "test": 1000}.items():
        meta = MetadataCatalog.get(f"deformed_digits_{split}")
        assert f"deformed_digits_{split}" in DatasetCatalog
        assert meta.thing_classes == list("0123456789")
        assert meta.evaluator_type == "pascal_voc"
        assert f"_{split}_{count}_" in os.path.basename(meta.dirname)
        assert MetadataCatalog.get(f"deformed_digits_sem_seg_{split}").evaluator_type == "sem_seg"


def test_registered_data_set_is_made_when_first_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("D2_DEFORM_CACHE", str(tmp_path))
    dd.register_deformed_digits("digits_of_a_test", "val", 2, image_size=64)
    try:
        meta = MetadataCatalog.get("digits_of_a_test")
        assert not os.listdir(tmp_path)
        assert len(DatasetCatalog.get("digits_of_a_test")) == 2
        assert os.listdir(tmp_path) == [os.path.basename(meta.dirname)]
        assert PathManager.isfile(os.path.join(meta.dirname, "ImageSets/Main/val.txt"))
    finally:
        DatasetCatalog.remove("digits_of_a_test")
        MetadataCatalog.remove("digits_of_a_test")


def test_every_setting_changes_the_folder():
    folders = {
        dd.deformed_digits_folder("train", 10),
        dd.deformed_digits_folder("val", 10),
        dd.deformed_digits_folder("train", 11),
        dd.deformed_digits_folder("train", 10, seed=1),
    }
    changed = [
        {"image_size": 64},
        {"min_digits": 1},
        {"max_digits": 6},
        {"min_height": 0.1},
        {"max_height": 0.5},
        {"rotation": 10.0},
        {"shear": 0.1},
        {"aspect": 0.1},
        {"warp": 0.01},
        {"max_overlap": 0.1},
    ]
    for setting in changed:
        folders.add(dd.deformed_digits_folder("train", 10, 0, dd.DeformedDigitsSettings(**setting)))
    assert len(folders) == 4 + len(changed)


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    draw = drawing.draw_picture

    def fail_at_two(split, seed, index, settings):
        if index == 2:
            raise KeyboardInterrupt
        return draw(split, seed, index, settings)

    monkeypatch.setattr(dd, "draw_picture", fail_at_two)
    with pytest.raises(KeyboardInterrupt):
        dd.write_deformed_digits(str(tmp_path / "digits"), "train", 4)
    assert not os.listdir(tmp_path)


def test_two_writers_at_once_do_not_clash(tmp_path, monkeypatch):
    both_started = threading.Barrier(2)
    write_files = dd._write_files

    def write_together(*arguments):
        both_started.wait(timeout=20)
        write_files(*arguments)

    monkeypatch.setattr(dd, "_write_files", write_together)
    failures = []

    def make():
        try:
            dd.write_deformed_digits(str(tmp_path / "digits"), "train", 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["digits"]
    assert len(os.listdir(tmp_path / "digits" / "JPEGImages")) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 8}, "image_size is 8; expected 32"),
        ({"min_digits": 6}, "min_digits, max_digits are 6, 5"),
        ({"max_height": 1.5}, "expected 0 < min_height <= max_height <= 0.8"),
        ({"warp": -0.1}, "warp is -0.1; expected 0 to 0.2"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        dd.DeformedDigitsSettings(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian", 1, 0), "split is 'trian'; expected one of train, val, test"),
        (("train", 0, 0), "num_images is 0"),
        (("train", 1, -1), "seed is -1"),
    ],
)
def test_wrong_request(arguments, message):
    with pytest.raises(ValueError, match=message):
        dd.deformed_digits_folder(*arguments)


def test_missing_package_is_named():
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        drawing._require("no_such_module_of_sklearn", "scikit-learn")
