"""Every file under ``configs/``: what its name says, what the paper says, and that it builds."""

import re

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

import d2_deform.modeling  # noqa: F401  registers the parts
from d2_deform import model_zoo

NAMES = model_zoo.list_configs()

# README, "Configs": <method>_<backbone>[_dil<d>][_[m]dconv<n>][_dpool][_ms][_vote][_release].yaml
NAME_RULE = re.compile(
    r"(?P<method>category_aware_rpn|classifier|deeplab|faster_rcnn|mask_rcnn|rfcn|rpn)"
    r"_(thin_)?(?P<backbone>R_18|R_50|R_101|AIR)(?P<fpn>_FPN)?"
    r"(_dil(?P<dilation>[468]))?"
    r"(_(?P<modulated>m?)dconv(?P<layers>\d+))?"
    r"(?P<dpool>_dpool)?(?P<ms>_ms)?(?P<vote>_vote)?(?P<release>_release)?\.yaml"
)
RULED = [name for name in NAMES if not name.startswith(("quick_schedules/", "quickstart"))]
# Folders with one recipe for each network, not its plain and deformable rows
OWN_RECIPES = ("COCO-Segmentation/", "Deformed-Digits/", "Image-Folder/", "VOC-Folder/")
META_ARCHITECTURES = {
    "category_aware_rpn": "CategoryAwareRPN",
    "classifier": "ImageClassifier",
    "deeplab": "SemanticSegmentor",
    "faster_rcnn": "GeneralizedRCNN",
    "mask_rcnn": "GeneralizedRCNN",
    "rfcn": "RFCN",
    "rpn": "ProposalNetwork",
}


def load(name: str) -> CfgNode:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.WEIGHTS = ""
    return cfg


def build_without_memory(cfg: CfgNode) -> nn.Module:
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_deformable(cfg: CfgNode) -> int:
    return sum(cfg.MODEL.DEFORM.NUM_LAYERS_PER_STAGE) or cfg.MODEL.DEFORM.NUM_LAYERS


def pools_deformably(cfg: CfgNode) -> bool:
    return {
        "RFCN": cfg.MODEL.RFCN.DEFORM_POOL,
        "GeneralizedRCNN": cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "DeformRoIPool",
    }.get(cfg.MODEL.META_ARCHITECTURE, False)


def flatten(node: CfgNode, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def differing_keys(one: CfgNode, other: CfgNode) -> set[str]:
    left, right = flatten(one), flatten(other)
    return {key for key in left if left[key] != right[key]}


@pytest.mark.parametrize("name", RULED)
def test_name_says_what_the_file_holds(name: str) -> None:
    found = NAME_RULE.fullmatch(name.rpartition("/")[2])
    assert found, f"{name} does not follow the rule"
    cfg = load(name)
    model = cfg.MODEL
    assert model.META_ARCHITECTURE == META_ARCHITECTURES[found["method"]]
    assert found["method"] != "mask_rcnn" or model.MASK_ON
    assert ("fpn" in model.BACKBONE.NAME) == bool(found["fpn"])
    if found["backbone"] == "AIR":
        assert "aligned_inception_resnet" in model.BACKBONE.NAME
    else:
        assert "deform_resnet" in model.BACKBONE.NAME
        assert model.RESNETS.DEPTH == int(found["backbone"][2:])
    if found["method"] != "rpn":
        if found["fpn"] or found["method"] == "classifier":
            default = 1
        else:  # Deformed Digits are seen at stride 8
            default = 4 if name.startswith("Deformed-Digits/") else 2
        assert int(found["dilation"] or default) == model.RESNETS.RES5_DILATION
    assert int(found["layers"] or 0) == count_deformable(cfg)
    assert model.DEFORM.MODULATED == (found["modulated"] == "m")
    assert pools_deformably(cfg) == bool(found["dpool"])
    assert cfg.TEST.AUG.ENABLED == bool(found["ms"])
    assert cfg.TEST.BOX_VOTING.ENABLED == bool(found["vote"])


def rows(method: str, *, pooling: bool) -> set[str]:
    """File names of tables 1 and 3."""
    changes = ["", "_dconv1", "_dconv2", "_dconv3", "_dconv6", "_dil4", "_dil6", "_dil8"]
    if pooling:
        changes += ["_dpool", "_dconv3_dpool"]
    return {f"{method}_R_101{change}.yaml" for change in changes}


@pytest.mark.parametrize(
    "folder, names",
    [
        ("VOC-Segmentation", rows("deeplab", pooling=False)),
        ("Cityscapes", rows("deeplab", pooling=False)),
        ("VOC-Ablation", rows("category_aware_rpn", pooling=False)),
        ("VOC-Ablation", rows("faster_rcnn", pooling=True)),
        ("VOC-Ablation", rows("rfcn", pooling=True)),
        (
            "COCO-Detection",  # table 5
            {"category_aware_rpn_R_101.yaml", "category_aware_rpn_R_101_dconv3.yaml"}
            | {
                f"{method}_{backbone}{change}.yaml"
                for method in ("faster_rcnn", "rfcn")
                for backbone in ("R_101", "AIR")
                for change in ("", "_dconv3_dpool")
            }
            | {
                f"rfcn_AIR{change}{test}.yaml"
                for change in ("", "_dconv3_dpool")
                for test in ("_ms", "_ms_vote")
            },
        ),
    ],
)
def test_every_row_of_the_papers_tables_is_there(folder: str, names: set[str]) -> None:
    assert {f"{folder}/{name}" for name in names} <= set(NAMES)


@pytest.mark.parametrize(
    "name",
    [name for name in RULED if "_release" not in name and not name.startswith(OWN_RECIPES)],
)
def test_differs_from_its_plain_network_in_what_its_name_says_only(name: str) -> None:
    folder, _, file = name.rpartition("/")
    found = NAME_RULE.fullmatch(file)
    assert found
    plain = f"{folder}/{found['method']}_{found['backbone']}{found['fpn'] or ''}.yaml"
    allowed: set[str] = set()
    if found["layers"]:
        allowed |= {"MODEL.DEFORM.NUM_LAYERS"}
    if found["modulated"]:
        allowed |= {"MODEL.DEFORM.MODULATED", "SOLVER.OFFSET_LR_FACTOR"}
    if found["dilation"]:
        allowed |= {"MODEL.RESNETS.RES5_DILATION"}
    if found["dpool"]:
        allowed |= {"MODEL.RFCN.DEFORM_POOL", "MODEL.ROI_BOX_HEAD.POOLER_TYPE"}
        allowed |= {"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"} if found["fpn"] else set()
    if found["ms"]:
        allowed |= {f"TEST.AUG.{key}" for key in ("ENABLED", "MIN_SIZES", "MAX_SIZE", "FLIP")}
    if found["vote"]:
        allowed |= {"TEST.BOX_VOTING.ENABLED"}
    assert differing_keys(load(plain), load(name)) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_builds_with_the_offset_layers_asked_for(name: str) -> None:
    cfg = load(name)
    model = build_without_memory(cfg)
    offsets = {key.split("offset")[0] for key in model.state_dict() if "offset" in key}
    convolutions = count_deformable(cfg)
    if "aligned_inception" in cfg.MODEL.BACKBONE.NAME:
        convolutions *= 3  # of each block
    pools = 0
    if pools_deformably(cfg):
        pools = 2 if cfg.MODEL.META_ARCHITECTURE == "RFCN" else len(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    assert len(offsets) == convolutions + pools


def test_backbones_for_own_folders_differ_in_nothing_else() -> None:
    thin = load("VOC-Folder/rfcn_thin_R_50_dconv3_dpool.yaml")
    full = load("VOC-Folder/rfcn_R_50_dconv3_dpool.yaml")
    assert differing_keys(thin, full) == {
        "MODEL.PIXEL_MEAN",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
    }


CONVOLUTIONS = 3 * (512 * 3 * 3 + 1) * 18  # three offset convolutions of res5


@pytest.mark.parametrize(
    "plain, deformable, added",
    [
        # 47.1 M -> 49.5 M; an offset for every bin of every class and of the box
        ("rfcn_R_101", "rfcn_R_101_dconv3_dpool", CONVOLUTIONS + 2 * 7 * 7 * (21 + 1) * (1024 + 1)),
        # 58.3 M -> 59.9 M; one fully connected layer on 7 x 7 x 256
        (
            "faster_rcnn_R_101",
            "faster_rcnn_R_101_dconv3_dpool",
            CONVOLUTIONS + (7 * 7 * 256 + 1) * 2 * 7 * 7,
        ),
        # 46.0 M -> 46.1 M
        ("category_aware_rpn_R_101", "category_aware_rpn_R_101_dconv3", CONVOLUTIONS),
        (
            "../VOC-Segmentation/deeplab_R_101",
            "../VOC-Segmentation/deeplab_R_101_dconv3",
            CONVOLUTIONS,
        ),
    ],
)
def test_parameters_added(plain: str, deformable: str, added: int) -> None:
    """Table 4, with the one deformable group that its figures fit."""
    assert CONVOLUTIONS == 248_886
    counts = [
        count_parameters(build_without_memory(load(f"VOC-Ablation/{name}.yaml")))
        for name in (plain, deformable)
    ]
    assert counts[1] - counts[0] == added


def test_parameters_added_by_the_releases_four_groups() -> None:
    one = build_without_memory(load("VOC-Detection/rfcn_R_101_dconv3_dpool.yaml"))
    four = build_without_memory(load("VOC-Detection/rfcn_R_101_dconv3_dpool_release.yaml"))
    assert count_parameters(four) - count_parameters(one) == 3 * CONVOLUTIONS


@pytest.mark.parametrize(
    "name, iterations",
    [
        ("VOC-Detection/rfcn_R_101_dconv3_dpool.yaml", 30_000),
        ("VOC-Ablation/faster_rcnn_R_101_dpool.yaml", 30_000),
        ("VOC-Segmentation/deeplab_R_101_dconv3.yaml", 30_000),
        ("Cityscapes/deeplab_R_101_dconv3.yaml", 45_000),
        ("COCO-Detection/category_aware_rpn_R_101.yaml", 240_000),
        ("COCO-Detection/rfcn_AIR_dconv3_dpool_ms_vote.yaml", 240_000),
    ],
)
def test_schedule_is_the_papers_at_the_releases_rate(name: str, iterations: int) -> None:
    solver = load(name).SOLVER
    pictures = solver.IMS_PER_BATCH
    assert pictures == solver.REFERENCE_WORLD_SIZE == 8
    assert solver.BASE_LR == pytest.approx(5e-4 * pictures)
    assert solver.WEIGHT_DECAY == pytest.approx(5e-4 / pictures)
    assert solver.MAX_ITER == iterations
    assert solver.STEPS == (iterations * 2 // 3,)
