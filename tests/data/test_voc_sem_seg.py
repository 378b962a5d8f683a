"""VOC 2012 with SBD for semantic segmentation, on small files of the documented layout."""

import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import SemSegEvaluator
from detectron2.evaluation.sem_seg_evaluation import load_image_into_numpy_array
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

import d2_deform.data  # noqa: F401  registers the data sets
from d2_deform.data import voc_sem_seg
from d2_deform.data.voc_sem_seg import class_colours, load_voc_sem_seg, write_class_indices

# Which list names which picture; SBD's own split cuts across VOC's.
VOC_LISTS = {"train": ["2007_000032", "2008_000015"], "val": ["2007_000033", "2008_000028"]}
SBD_LISTS = {
    "train": ["2008_000015", "2008_000028", "2010_000002"],
    "val": ["2011_000003", "2007_000033"],
}
SIZE = (24, 40)  # height, width
VOC_PALETTE = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192)}


def voc_labels() -> np.ndarray:
    """An aeroplane and a person, each with VOC's border of 255 around it."""
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[3:13, 3:13] = 255
    labels[4:12, 4:12] = 1
    labels[9:21, 19:36] = 255
    labels[10:20, 20:35] = 15
    return labels


def sbd_labels() -> np.ndarray:
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[2:9, 5:30] = 20
    return labels


@pytest.fixture
def voc(tmp_path):
    """VOC2012 with four label maps in colours, and JPEGs of all pictures."""
    root = tmp_path / "datasets" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for index, colour in VOC_PALETTE.items():
        palette[index] = colour
    for split, ids in VOC_LISTS.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for image_id in ids:
            image = Image.fromarray(voc_labels()).convert("P")
            image.putpalette(palette.ravel().tolist())
            image.save(root / "SegmentationClass" / f"{image_id}.png")
    for image_id in {i for ids in (*VOC_LISTS.values(), *SBD_LISTS.values()) for i in ids}:
        Image.new("RGB", SIZE[::-1], (90, 120, 60)).save(root / "JPEGImages" / f"{image_id}.jpg")
    return root


@pytest.fixture
def sbd(tmp_path):
    """benchmark_RELEASE/dataset."""
    root = tmp_path / "benchmark_RELEASE" / "dataset"
    (root / "cls").mkdir(parents=True)
    for split, ids in SBD_LISTS.items():
        (root / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
        for image_id in ids:
            boundaries = np.empty((20, 1), dtype=object)
            boundaries[:, 0] = [csc_matrix(SIZE, dtype=bool) for _ in range(20)]
            content = {
                "Boundaries": boundaries,
                "Segmentation": sbd_labels(),
                "CategoriesPresent": np.array([[20]], dtype=np.uint8),
            }
            savemat(root / "cls" / f"{image_id}.mat", {"GTcls": content})
    return root


def read_labels(path) -> np.ndarray:
    return np.array(Image.open(path))


def test_colours_are_vocs():
    assert len(class_colours()) == 21
    for index, colour in VOC_PALETTE.items():
        if index < 21:
            assert tuple(class_colours()[index]) == colour
    assert class_colours()[20] == [0, 64, 128]  # tvmonitor
    assert len({tuple(colour) for colour in class_colours()}) == 21


@pytest.mark.parametrize("split", ["train", "val", "train_aug"])
def test_registered_at_import(split):
    name = f"voc_2012_sem_seg_{split}"
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "sem_seg" and metadata.ignore_label == 255
    assert metadata.stuff_classes[0] == "background" and len(metadata.stuff_classes) == 21
    assert [metadata.stuff_classes[i] for i in (1, 15, 20)] == ["aeroplane", "person", "tvmonitor"]
    assert len(metadata.stuff_colors) == 21
    assert metadata.dirname.endswith("VOC2012")


def test_the_trap_is_real(voc):
    """Detectron2's mapper reads VOC's own PNGs as grey values, its evaluator as indices."""
    path = voc / "SegmentationClass" / "2007_000032.png"
    grey = read_image(path, "L")[:, :, 0]
    assert set(np.unique(grey)) == {0, 38, 147, 220}
    assert set(np.unique(load_image_into_numpy_array(path, copy=None))) == {0, 1, 15, 255}


def test_label_maps_are_plain_indices(voc, sbd):
    numbers = write_class_indices(str(voc), str(sbd))
    assert numbers == {"train": 2, "val": 2, "trainaug": 4, "label maps": 6}
    folder = voc / "SegmentationClassAug"
    assert sorted(os.listdir(folder)) == [
        f"{image_id}.png"
        for image_id in (
            "2007_000032",
            "2007_000033",
            "2008_000015",
            "2008_000028",
            "2010_000002",
            "2011_000003",
        )
    ]
    for image_id in VOC_LISTS["train"] + VOC_LISTS["val"]:  # VOC's where SBD has one too
        assert np.array_equal(read_labels(folder / f"{image_id}.png"), voc_labels())
    for image_id in ("2010_000002", "2011_000003"):
        assert np.array_equal(read_labels(folder / f"{image_id}.png"), sbd_labels())
    assert (folder.stat().st_mode & 0o777) == (voc.stat().st_mode & 0o777)


def test_train_aug_has_both_lists_of_sbd_and_nothing_of_vocs_val(voc, sbd):
    write_class_indices(str(voc), str(sbd))
    listed = (voc / "ImageSets" / "Segmentation" / "trainaug.txt").read_text()
    assert listed == "2007_000032\n2008_000015\n2010_000002\n2011_000003\n"


def test_without_sbd(voc):
    assert write_class_indices(str(voc)) == {"train": 2, "val": 2, "label maps": 4}
    assert [record["image_id"] for record in load_voc_sem_seg(str(voc), "val")] == VOC_LISTS["val"]
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt is missing; .*prepare_voc_aug"):
        load_voc_sem_seg(str(voc), "trainaug")


def test_records(voc, sbd):
    write_class_indices(str(voc), str(sbd))
    records = load_voc_sem_seg(str(voc), "trainaug")
    assert records[0] == {
        "file_name": str(voc / "JPEGImages" / "2007_000032.jpg"),
        "image_id": "2007_000032",
        "height": 24,
        "width": 40,
        "sem_seg_file_name": str(voc / "SegmentationClassAug" / "2007_000032.png"),
    }
    assert len(records) == 4


def test_mapper_and_evaluator_read_the_same_indices(voc, sbd):
    write_class_indices(str(voc), str(sbd))
    (record,) = (r for r in load_voc_sem_seg(str(voc), "train") if r["image_id"] == "2007_000032")
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(48, 1000), T.RandomFlip(prob=1.0)],
        image_format="BGR",
    )
    mapped = mapper(record)
    enlarged = voc_labels().repeat(2, axis=0).repeat(2, axis=1)[:, ::-1]
    assert mapped["image"].shape == (3, 48, 80)
    assert np.array_equal(mapped["sem_seg"].numpy(), enlarged)

    name = "test_voc_sem_seg_evaluator"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(stuff_classes=list(voc_sem_seg.STUFF_CLASSES), ignore_label=255)
    try:
        evaluator = SemSegEvaluator(name)
        loaded = load_image_into_numpy_array(
            evaluator.input_file_to_gt_file[record["file_name"]], copy=None, dtype=int
        )
        assert np.array_equal(loaded, voc_labels())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_colour_indexed_maps_are_refused(voc):
    os.rename(voc / "SegmentationClass", voc / "SegmentationClassAug")
    with pytest.raises(ValueError, match=r"2007_000032\.png has Pillow's mode 'P', expected 'L'"):
        load_voc_sem_seg(str(voc), "train")


def test_nothing_is_overwritten(voc, sbd):
    write_class_indices(str(voc), str(sbd))
    with pytest.raises(FileExistsError, match="SegmentationClassAug exists; use it as it is, or"):
        write_class_indices(str(voc), str(sbd))


def test_a_list_that_is_there_stays_if_it_is_the_same(voc, sbd):
    path = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    text = "2011_000003\n2010_000002\n2008_000015\n2007_000032\n"
    path.write_text(text)
    write_class_indices(str(voc), str(sbd))
    assert path.read_text() == text


def test_another_list_is_refused(voc, sbd):
    path = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    path.write_text("2011_000003\n")
    with pytest.raises(FileExistsError, match=r"trainaug\.txt exists and lists other pictures"):
        write_class_indices(str(voc), str(sbd))
    assert not (voc / "SegmentationClassAug").exists()


def break_mat(voc, sbd):
    (sbd / "cls" / "2010_000002.mat").write_bytes(b"")
    return ValueError, r"2010_000002\.mat is no label map of VOC or SBD"


def other_mat(voc, sbd):
    savemat(sbd / "cls" / "2010_000002.mat", {"GTinst": np.zeros(3)})
    return ValueError, r"2010_000002\.mat is no label map of VOC or SBD"


def lose_mat(voc, sbd):
    (sbd / "cls" / "2010_000002.mat").unlink()
    return FileNotFoundError, r"2010_000002\.mat is missing"


def lose_png(voc, sbd):
    (voc / "SegmentationClass" / "2007_000033.png").unlink()
    return FileNotFoundError, r"2007_000033\.png is missing"


def cut_png(voc, sbd):
    path = voc / "SegmentationClass" / "2007_000033.png"
    path.write_bytes(path.read_bytes()[:-60])
    return ValueError, r"2007_000033\.png is no label map of VOC or SBD"


def turn_png_grey(voc, sbd):
    path = voc / "SegmentationClass" / "2007_000033.png"
    Image.open(path).convert("L").save(path)
    return ValueError, r"2007_000033\.png has label 38; expected 0 to 20 and 255"


def turn_png_rgb(voc, sbd):
    path = voc / "SegmentationClass" / "2007_000033.png"
    Image.open(path).convert("RGB").save(path)
    return ValueError, r"2007_000033\.png is no label map .*'RGB', expected 'P'"


def lose_list(voc, sbd):
    (sbd / "val.txt").unlink()
    return FileNotFoundError, r"val\.txt is missing"


def empty_list(voc, sbd):
    (sbd / "val.txt").write_text("\n")
    return ValueError, r"val\.txt lists no picture"


@pytest.mark.parametrize(
    "damage",
    [
        break_mat,
        other_mat,
        lose_mat,
        lose_png,
        cut_png,
        turn_png_grey,
        turn_png_rgb,
        lose_list,
        empty_list,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_flaw_is_told_and_leaves_nothing_behind(voc, sbd, damage):
    kind, message = damage(voc, sbd)
    before = sorted(os.listdir(voc))
    with pytest.raises(kind, match=message) as error:
        write_class_indices(str(voc), str(sbd))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(voc)) == before
    assert not (voc / "ImageSets" / "Segmentation" / "trainaug.txt").exists()


def test_scipy_missing_is_told(voc, sbd, monkeypatch):
    def no_scipy(name):
        raise ImportError(name)

    monkeypatch.setattr(voc_sem_seg.importlib, "import_module", no_scipy)
    with pytest.raises(ImportError, match="pip install scipy"):
        write_class_indices(str(voc), str(sbd))


def test_missing_files_are_told_when_loading(voc, sbd):
    with pytest.raises(FileNotFoundError, match=r"000032\.png is missing; make it by tools/prep"):
        load_voc_sem_seg(str(voc), "train")
    write_class_indices(str(voc), str(sbd))
    (voc / "JPEGImages" / "2008_000015.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2008_000015\.jpg is missing"):
        load_voc_sem_seg(str(voc), "train")
