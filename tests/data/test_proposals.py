"""Files of proposals: what Detectron2 reads from them, and what is told before a training."""

import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from d2_deform.data.proposals import check_proposal_files, read_settings, write_proposals

NAME = "images_of_a_test"
BOX = [4.0, 6.0, 20.0, 30.0]


def instances(boxes, logits):
    found = Instances((50, 40))
    found.proposal_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.objectness_logits = torch.tensor(logits)
    return found


@pytest.fixture(params=[str, int])
def dataset(request, tmp_path):
    """Two pictures of 40 x 50, with ids that are words or numbers; their ids."""
    ids = [request.param(7), request.param(12)]
    records = []
    for image_id in ids:
        path = str(tmp_path / f"{image_id}.png")
        Image.new("RGB", (40, 50)).save(path)
        annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        records.append(
            {
                "file_name": path,
                "image_id": image_id,
                "height": 50,
                "width": 40,
                "annotations": [annotation],
            }
        )
    DatasetCatalog.register(NAME, lambda: records)
    yield ids
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "made" / "proposals.pkl")


def config(*files, names=(NAME,), **values):
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = names
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = files
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_detectron2_reads_them_best_first(dataset, path):
    first = instances([BOX, [0.0, 0.0, 9.0, 9.0]], [-1.0, 2.0])
    write_proposals(path, {dataset[1]: instances([], []), dataset[0]: first}, {})
    check_proposal_files(config(path))
    one, two = get_detection_dataset_dicts([NAME], proposal_files=[path])
    assert one["proposal_boxes"].tolist() == [[0, 0, 9, 9], BOX]
    assert one["proposal_objectness_logits"].tolist() == [2, -1]
    assert one["proposal_bbox_mode"] == BoxMode.XYXY_ABS
    assert two["proposal_boxes"].shape == (0, 4)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_they_follow_a_picture_that_is_resized_and_flipped(flip, dataset, path):
    write_proposals(path, {i: instances([BOX], [1.0]) for i in dataset}, {})
    cfg = config(path)
    cfg.INPUT.MIN_SIZE_TRAIN = (80,)
    cfg.INPUT.RANDOM_FLIP = flip
    record = get_detection_dataset_dicts([NAME], proposal_files=[path])[0]
    mapper = DatasetMapper(cfg, is_train=True)
    expected = {
        "none": {(8.0, 12.0, 40.0, 60.0)},
        "horizontal": {(8.0, 12.0, 40.0, 60.0), (40.0, 12.0, 72.0, 60.0)},
        "vertical": {(8.0, 12.0, 40.0, 60.0), (8.0, 40.0, 40.0, 88.0)},
    }
    seen = set()
    for seed in range(8):
        np.random.seed(seed)  # noqa: NPY002 (what Detectron2 draws from)
        mapped = mapper(record)
        torch.testing.assert_close(
            mapped["proposals"].proposal_boxes.tensor, mapped["instances"].gt_boxes.tensor
        )
        seen.add(tuple(mapped["proposals"].proposal_boxes.tensor[0].tolist()))
    assert seen == expected[flip]


def test_a_file_is_written_whole_or_not_at_all(path, monkeypatch):
    write_proposals(path, {"a": instances([BOX], [1.0])}, {"MODEL.RPN.X": 1})
    assert os.listdir(os.path.dirname(path)) == ["proposals.pkl"]
    monkeypatch.setattr(pickle, "dump", lambda _, file, **__: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        write_proposals(path, {}, {})
    assert read_settings(path) == {"MODEL.RPN.X": 1}


def test_an_image_without_proposals(dataset, path):
    write_proposals(path, {dataset[0]: instances([BOX], [1.0])}, {})
    message = rf"PROPOSAL_FILES_TRAIN: .*has no proposals for 1 of the 2 images of {NAME}.* '12'"
    with pytest.raises(ValueError, match=message):
        check_proposal_files(config(path))
    with pytest.raises(ValueError, match="PROPOSAL_FILES_TEST"):
        check_proposal_files(config(path), train=False)
    with pytest.raises(KeyError):  # what Detectron2 says
        get_detection_dataset_dicts([NAME], proposal_files=[path])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"there is no file .*dump_proposals\.py makes it"),
        (b"", "no pickle, or a damaged one"),
        (b"boxes", "no pickle, or a damaged one"),
        (b"cposix\nsystem\n(S'true'\ntR.", r"it calls posix\.system, which no array needs"),
        (pickle.dumps([1]), "no file of proposals; it lacks one of ids, boxes, objectness_logits"),
        (pickle.dumps({"ids": [1]}), "it lacks one of"),
        (pickle.dumps({"ids": [1], "boxes": [], "objectness_logits": []}), "different lengths"),
        (pickle.dumps({"indexes": [], "boxes": [], "scores": []}), "no proposals for 2 of the 2"),
    ],
)
def test_flawed_files(content, message, dataset, tmp_path):
    path = tmp_path / "proposals.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"PROPOSAL_FILES_TRAIN: .*{message}"):
        check_proposal_files(config(str(path)))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"MODEL__LOAD_PROPOSALS": False}, "but MODEL.LOAD_PROPOSALS is False"),
        ({"MODEL__PROPOSAL_GENERATOR__NAME": "RPN"}, '"RPN", which makes its own'),
        ({"TEST__AUG__ENABLED": True}, r"TEST\.AUG\.ENABLED is True"),
        ({}, r"PROPOSAL_FILES_TRAIN has 0 file\(s\) for 1 data set\(s\) images_of_a_test"),
    ],
)
def test_keys_that_do_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        check_proposal_files(config(**values))


def test_a_config_without_precomputed_proposals_is_left_alone():
    check_proposal_files(get_cfg())
