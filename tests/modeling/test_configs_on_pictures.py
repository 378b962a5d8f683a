"""Every config takes one training step and makes one prediction on a genuine picture, small."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import d2_deform.modeling  # noqa: F401  registers the parts
from d2_deform import model_zoo
from d2_deform.solver import build_optimizer

SHORTER_SIDE = 128
SHRINK = 600 / SHORTER_SIDE


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A VOC picture of three objects or more, with the boxes' outlines as polygons."""
    try:
        records = DatasetCatalog.get("voc_2012_train")
    except FileNotFoundError:
        pytest.skip("DETECTRON2_DATASETS has no VOC2012")
    record = copy.deepcopy(next(r for r in records if len(r["annotations"]) >= 3))
    for annotation in record["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return record


def small(name: str) -> CfgNode:
    """The config with everything that goes by pixels shrunk, and norms that need no weights."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [size / SHRINK for size in sizes] for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    # Box losses of a first step at the full rate can throw all boxes out of the picture
    cfg.SOLVER.BASE_LR *= cfg.SOLVER.WARMUP_FACTOR
    return cfg


def to_input(record: dict[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """What a data loader gives: the picture at small size and what its network learns from."""
    image = detection_utils.read_image(record["file_name"], format=cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    augmented = T.AugInput(image)
    transform = T.ResizeShortestEdge(SHORTER_SIDE)(augmented)
    size = augmented.image.shape[:2]
    annotations = [
        detection_utils.transform_instance_annotations(copy.deepcopy(annotation), transform, size)
        for annotation in record["annotations"]
    ]
    instances = detection_utils.annotations_to_instances(annotations, size)
    sem_seg = torch.zeros(size, dtype=torch.long)
    for box, label in zip(instances.gt_boxes, instances.gt_classes, strict=True):
        x1, y1, x2, y2 = box.round().int().tolist()
        sem_seg[y1:y2, x1:x2] = (1 + label) % cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    instances.gt_classes %= cfg.MODEL.ROI_HEADS.NUM_CLASSES
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes.cat(
        [instances.gt_boxes, Boxes([[0, 0, size[1] / 2, size[0] / 2]])]
    )
    proposals.objectness_logits = torch.zeros(len(proposals))
    return {
        "image": torch.as_tensor(augmented.image.transpose(2, 0, 1).copy()),
        "label": 0,
        "height": height,
        "width": width,
        "instances": instances,
        "sem_seg": sem_seg,
        "proposals": proposals,
    }


@pytest.mark.parametrize("name", model_zoo.list_configs())
def test_learns_and_predicts(name: str, record: dict[str, Any], record_property: Any) -> None:
    torch.manual_seed(0)
    cfg = small(name)
    model = build_model(cfg)
    given = to_input(record, cfg)
    parameters = dict(model.named_parameters())
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    record_property("config", name)
    record_property("parameters", sum(p.numel() for p in parameters.values()))
    record_property("offsets", sum(p.numel() for k, p in parameters.items() if "offset" in k))

    with EventStorage():
        losses = model([given])
    sum(losses.values()).backward()
    build_optimizer(cfg, model).step()
    assert losses
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    for key, parameter in parameters.items():
        assert parameter.isfinite().all(), key
    # Biases do not decay: they change where something is learnt. On a pyramid, RoIs this small lie
    # on the first level alone.
    for key in parameters:
        if key.endswith("bias") and "offset" in key and not re.search("level_poolers.[1-3]", key):
            assert not torch.equal(parameters[key], before[key]), key

    model.eval()
    with torch.no_grad():
        (output,) = model([given])
    if "sem_seg" in output:
        assert output["sem_seg"].shape[-2:] == (given["height"], given["width"])
        assert output["sem_seg"].isfinite().all()
    elif "scores" in output:
        assert output["scores"].shape == (cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES,)
        assert output["scores"].isfinite().all()
    else:
        found = output.get("instances", output.get("proposals"))
        assert found.image_size == (given["height"], given["width"])
        boxes = (found.pred_boxes if "instances" in output else found.proposal_boxes).tensor
        assert boxes.isfinite().all()
